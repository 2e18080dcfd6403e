"""Images to videos. `Sampler` is imported at its first use, because the benchmark runs without its dependencies."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfv_jax.sampling.sampler import Sampler

__all__ = ["Sampler"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sfv_jax.sampling.sampler import Sampler

    return Sampler

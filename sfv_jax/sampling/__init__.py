"""From images to videos. `Sampler` is loaded when it is asked for: the benchmark needs less than it imports."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfv_jax.sampling.sampler import Sampler

__all__ = ["Sampler"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sfv_jax.sampling.sampler import Sampler

    return Sampler

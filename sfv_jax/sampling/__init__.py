"""From images to videos."""

from sfv_jax.sampling.sampler import Sampler

__all__ = ["Sampler"]

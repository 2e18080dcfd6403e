"""SF-V in JAX: videos from one image in one forward pass (arXiv 2406.04324)."""

__version__ = "0.1.0"

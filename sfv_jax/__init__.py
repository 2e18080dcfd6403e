"""SF-V in JAX: image-to-video generation in a single forward pass (arXiv 2406.04324)."""

__version__ = "0.1.0"

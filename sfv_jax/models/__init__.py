"""Flax NNX models of Stable Video Diffusion and of the SF-V discriminator (jax, flax, einops and numpy only)."""

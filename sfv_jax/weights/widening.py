"""Exact embedding of a narrow VAE into one with the 32 groups that diffusers and others have built into every norm."""

import math
from dataclasses import replace

import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.vae import TemporalVAE, VAEConfig

GROUPS = 32


def widened(config: VAEConfig) -> VAEConfig:
    """Returns the config with 32 groups per norm, each as large as before; the same one if it cannot be embedded."""
    if config.norm_groups >= GROUPS or GROUPS % config.norm_groups:
        return config
    factor = GROUPS // config.norm_groups
    channels = tuple(factor * c for c in config.block_out_channels)
    return replace(config, norm_groups=GROUPS, block_out_channels=channels)


def widen(params: tree.Params, config: VAEConfig) -> tree.Params:
    """Returns parameters of `widened(config)` that compute the same.

    Channels are added behind the others, with zero weights everywhere, scales and shifts of norms included. They form
    groups of their own, so they stay zero and change no statistics. Attention divides by the root of its channels,
    which the queries make up for.

    Args:
      params: parameters of `config`, nested dict of arrays.
      config: config of the narrow VAE.
    """
    wide = widened(config)
    _, shapes = tree.abstract(TemporalVAE, wide)
    stretch = math.sqrt(wide.block_out_channels[-1] / config.block_out_channels[-1])
    flat, given = {}, tree.flatten(params)
    for path, like in tree.flatten(shapes).items():
        x = np.asarray(given[path])
        x = x * np.float32(stretch) if ".to_q." in path else x
        flat[path] = np.pad(x, [(0, more - size) for size, more in zip(x.shape, like.shape, strict=True)])
    return tree.unflatten(flat)

"""A narrow VAE in the form that other programs load computes the same."""

import jax
import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.weights.widening import widen, widened
from tests.conftest import noise

NARROW = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_groups=8, temporal_conv="matmul")


def outputs(config: VAEConfig, params) -> tuple:
    graph, _ = tree.abstract(TemporalVAE, config)
    frames, latents = noise(0, 1, 2, 8, 8, 3), noise(1, 1, 2, 4, 4, 4)
    return jax.jit(
        lambda params: (tree.build(graph, params).encode(frames), tree.build(graph, params).decode(latents))
    )(params)


def test_a_widened_vae_computes_the_same():
    params = tree.init(TemporalVAE, NARROW, 0)
    # Norms begin with scale 1 and shift 0, which would hide what is added to them.
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape), params)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    wide = widened(NARROW)
    assert wide.block_out_channels == (32, 64) and wide.norm_groups == 32
    for found, expected in zip(outputs(wide, widen(params, NARROW)), outputs(NARROW, params), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))


def test_what_has_enough_groups_or_does_not_divide_stays():
    for groups in (32, 64, 12):
        config = VAEConfig(norm_groups=groups)
        assert widened(config) is config

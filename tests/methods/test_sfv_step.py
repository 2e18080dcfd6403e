"""The SF-V step on real networks of one level: trained parameters, frozen parameters and metrics."""

import jax
import numpy as np
import pytest

from sfv_jax.methods import sfv
from sfv_jax.models import tree
from sfv_jax.models.unet import UNetConfig
from tests.methods.test_methods import QUICK, C, D, make_batch, moved, sfv_config


@pytest.fixture(scope="module")
def one_step():
    """Returns (state before, frozen before, state after, frozen after, metrics) of one jitted, donated step."""
    unet = UNetConfig(
        in_channels=2 * C,
        out_channels=C,
        block_out_channels=(16,),
        num_attention_heads=(2,),
        layers_per_block=1,
        cross_attention_dim=D,
        addition_time_embed_dim=8,
        norm_groups=4,
        temporal_conv="matmul",
    )
    config = sfv_config()
    config.dtype = "float32"
    config.discriminator.update(temporal_kernel=3, projection_dim=4, sinusoid_dim=8)
    networks = sfv.make_networks(unet, config)
    rng = np.random.default_rng(0)
    generator = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), networks.abstract["generator"]
    )
    state, frozen = sfv.init_state(networks, config, generator)
    before = jax.device_get((state, frozen))
    step = jax.jit(sfv.make_train_step(networks, config), donate_argnums=0, compiler_options=QUICK)
    after, metrics = step(state, frozen, make_batch(2))
    return *before, after, frozen, metrics


@pytest.mark.slow
def test_backbone_is_frozen(one_step):
    before, frozen_before, after, frozen, _ = one_step
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    same = tree.subtree(before["generator"], frozen_before["backbone"])
    jax.tree.map(np.testing.assert_array_equal, frozen_before["backbone"], same)  # as the generator started
    assert moved(before, after, "generator")


@pytest.mark.slow
def test_every_used_parameter_gets_a_gradient(one_step):
    """SM3's momentum is zero exactly where the gradient was. One token needs no query: its attention weight is 1."""
    _, _, after, _, _ = one_step
    idle = ("attn2.to_q", "attn2.to_k", "norm2")
    generator = tree.flatten(after["opt_g"][1].momentum)
    transformers = {k: v for k, v in generator.items() if "transformer_blocks" in k and any(n in k for n in idle)}
    assert transformers and not any(np.any(v) for v in transformers.values())
    assert not [k for k, v in generator.items() if k not in transformers and not np.any(v)]
    # Terms that are equal in real and fake scores cancel while all hinges are active.
    heads = {k: v for k, v in tree.flatten(after["opt_d"][1].momentum).items() if "conv_out.bias" not in k}
    assert not [k for k, v in heads.items() if not np.any(v)]


@pytest.mark.slow
def test_step_reports_finite_numbers(one_step):
    metrics = one_step[-1]
    assert {"loss/hinge", "loss/r1", "norm/heads_gradient", "live/temporal_0"} <= metrics.keys()
    assert all(np.isfinite(v) for v in metrics.values()) and metrics["loss/r1"] > 0

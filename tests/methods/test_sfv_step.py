"""The SF-V step on real networks of one level: trained parameters, frozen parameters and metrics."""

import jax
import numpy as np
import pytest

from sfv_jax.models import tree
from tests.methods.test_methods import moved
from tests.runtime.test_sharding import Steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_step(small_things_in_parts):  # as there, so that the program is the same
    """Returns (state before, frozen before, state after, frozen after, metrics) of one jitted, donated step."""
    steps = Steps(1, 1, 1, count=1)
    return *steps.first, steps.states[0], jax.device_get(steps.frozen), steps.metrics[0]


def test_backbone_is_frozen(one_step):
    before, frozen_before, after, frozen, _ = one_step
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    same = tree.subtree(before["generator"], frozen_before["backbone"])
    jax.tree.map(np.testing.assert_array_equal, frozen_before["backbone"], same)  # as the generator started
    assert moved(before, after, "generator")


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


def test_step_reports_finite_numbers(one_step):
    metrics = one_step[-1]
    assert {"loss/hinge", "loss/r1", "norm/heads_gradient", "live/temporal_0"} <= metrics.keys()
    assert all(np.isfinite(v) for v in metrics.values()) and metrics["loss/r1"] > 0

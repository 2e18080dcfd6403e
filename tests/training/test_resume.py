"""Resuming, on the run that compiles soonest."""

import jax
import numpy as np
import pytest

from sfv_jax.training.loop import train
from tests.support import small_run


@pytest.mark.slow
@pytest.mark.short
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    config = small_run.get_config()
    config.update(dict(steps=3, sample_every=0))
    whole = train(config, tmp_path / "whole")
    config.steps = 2
    train(config, tmp_path / "resumed")
    config.steps = 3
    resumed = train(config, tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

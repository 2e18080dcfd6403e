"""Runs that SIGKILL ends and the same command continues; `python -m tests.support.kills` kills many more."""

import pytest

from tests.support import kills


@pytest.mark.slow
def test_training_killed_and_continued_ends_as_if_undisturbed(tmp_path):
    outcome = kills.kill_train(tmp_path, 2, method="teacher", steps=8, trainable="conv_out")
    assert outcome.kills == 2 and outcome.inside >= 1


@pytest.mark.slow
def test_prepare_killed_and_continued_makes_the_same_cache(tmp_path):
    videos, svd = kills.make_inputs(tmp_path, clips=6)
    outcome = kills.kill_prepare(tmp_path, 2, videos, svd, height=32, width=48, num_frames=4, shard_size=1)
    assert outcome.kills == 2

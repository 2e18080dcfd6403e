"""What the quickstart shows, with the models in the package."""

import numpy as np
import pytest
from PIL import Image

from sfv_jax.data.worlds import World
from sfv_jax.reproduction import strips
from sfv_jax.reproduction.experiments import SCENES
from sfv_jax.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def samplers():
    return Sampler.load("world-teacher"), Sampler.load("world")


@pytest.mark.slow
def test_a_first_video_of_a_picture_of_any_shape(samplers, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    strips.first_video(samplers[1], picture, 32, tmp_path / "first.gif")
    with Image.open(tmp_path / "first.gif") as gif:
        assert gif.n_frames == 14 and min(gif.size) > 256


@pytest.mark.slow
def test_the_comparison_and_its_table(samplers, tmp_path, monkeypatch):
    monkeypatch.setattr(strips, "CLIPS", 1)
    monkeypatch.setattr(strips, "videos", lambda sampler, frames, steps: (sampler(frames[:, 0]), (steps, 0.4)))
    monkeypatch.setattr(strips, "by_tiny_decoder", lambda sampler: sampler)
    rows, clips = strips.compare(World(**SCENES), samplers[0], samplers[1], samplers[1])
    names = ["truth", "still image", *(f"base model, {steps}" for steps in ("25 steps", "4 steps", "1 step"))]
    names += ["SF-V, 1 step, distilled here", "SF-V, 1 step, of the package"]
    assert [*clips] == names and [row["name"] for row in rows] == [*names, "the same with the tiny decoder"]
    assert rows[5]["distance"] == rows[6]["distance"] == rows[7]["distance"]
    assert {x.shape for x in clips.values()} == {(1, 14, 32, 32, 3)}
    assert rows[0]["distance"] == 0 < rows[5]["distance"] < rows[1]["distance"]
    assert [row["milliseconds"] for row in rows] == [None, None, 25, 4, 1, 1, 1, 1]
    head, _, *lines = strips.table(rows).splitlines()
    assert head.count("|") == len(strips.COLUMNS) + 4 == lines[2].count("|")
    assert lines[2].startswith("| base model, 25 steps | 25 | 0 |")
    strips.picture(clips, tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.gif") as gif:
        assert gif.n_frames == 14
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert sheet.height > 5 * 64 and sheet.width > 14 * 64

"""Settings of a latent cache that depend on the model, or that older caches lack."""

import dataclasses
import json

import numpy as np
import pytest

from sfv_jax.checkpoints.base import clip_length
from sfv_jax.data import preparation
from sfv_jax.data.images import fitted
from sfv_jax.data.latents import LatentError
from sfv_jax.data.settings import Settings
from sfv_jax.data.video import read_clip, write_video
from tests.support.small_cache import SETTINGS, WORLD, encode


def test_clips_are_as_long_as_those_of_the_model(model_folder, pipeline_folder, tmp_path):
    (tmp_path / "vae").mkdir()
    length = json.loads((pipeline_folder / "unet" / "config.json").read_text())["num_frames"]
    assert clip_length(model_folder) == clip_length(pipeline_folder) == length != Settings().num_frames
    assert clip_length(tmp_path) is None  # encoders alone


def test_a_cache_that_was_begun_before_a_setting_existed_continues(tmp_path):
    for n in range(2):
        write_video(tmp_path / "in" / f"{n}.mp4", WORLD.clip(n)[0], fps=7)
    preparation.run(tmp_path / "in", tmp_path / "out", encode, SETTINGS)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["settings"]["fit"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    preparation.run(tmp_path / "in", tmp_path / "out", encode, SETTINGS)
    with pytest.raises(LatentError, match=r"fit \(was crop, is pad\)"):
        preparation.run(tmp_path / "in", tmp_path / "out", encode, dataclasses.replace(SETTINGS, fit="pad"))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_clips_of_another_shape_are_fitted_as_images_are(tmp_path, fit):
    """What `sample` does with an image is what `prepare` did with a clip."""
    write_video(tmp_path / "in" / "a.mp4", WORLD.clip(0)[0], fps=7)
    given = []

    def keep(frames, seeds):
        given.append(frames)
        return encode(frames, seeds)

    preparation.run(tmp_path / "in", tmp_path / "out", keep, dataclasses.replace(SETTINGS, fit=fit))
    expected = fitted(read_clip(tmp_path / "in" / "a.mp4", 4), SETTINGS.height, SETTINGS.width, fit)
    assert np.array_equal(given[0][0], expected)

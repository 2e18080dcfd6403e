"""The models in the package: complete, small, and as good as the docs say."""

import numpy as np
import pytest

from sfv_jax.checkpoints import box
from sfv_jax.checkpoints.base import load_encoders, read_unet
from sfv_jax.checkpoints.exporter import export_model
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.data.pictures import psnr
from sfv_jax.data.worlds import World
from sfv_jax.evaluation.world import nearest_future
from sfv_jax.reproduction.experiments import SCENES, VARIED
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.folders import WeightsError


def test_all_files_are_known_and_small():
    found = {path.relative_to(box.ROOT).as_posix(): path.stat().st_size for path in box.ROOT.glob("*/*")}
    assert found.keys() == {f"{name}/{file}" for name, files in box.NAMES.items() for file in files}
    assert 0 < sum(found.values()) < 25e6
    for name in box.NAMES:
        assert read_model(name).path == box.folder(name)


def test_what_needs_a_unet_says_that_there_is_none(tmp_path):
    for use in (Sampler.load, read_unet, lambda path: export_model(path, tmp_path / "out")):
        with pytest.raises(
            WeightsError, match=r"world-encoders has no unet, only (vae, image_encoder|image_encoder, vae)"
        ):
            use("world-encoders")


@pytest.mark.slow
def test_the_vae_reconstructs_held_out_clips():
    codec, identity = load_encoders("world-encoders")
    frames = World(**VARIED).batch(range(4), "heldout")[0]
    latents = codec.encode(frames) * codec.scaling_factor
    assert float(np.sqrt(np.mean(np.square(latents)))) == pytest.approx(1, abs=0.1)
    assert psnr(np.asarray(codec.decode(latents)), frames) > 29.5 and len(identity) == 129


@pytest.mark.slow
def test_the_tiny_decoder_is_nearly_as_good_as_that_of_the_vae():
    frames = World(**SCENES).batch(range(4), "heldout")[0]
    full = Sampler.load("world")
    tiny = full.with_decoder("tiny")
    assert isinstance(tiny.decoder, dict) and tiny.decoder["path"] == "world-decoder"
    latents = full.codec.encode(frames) * full.codec.scaling_factor
    by_full, by_tiny = (np.asarray(sampler.codec.decode(latents)) for sampler in (full, tiny))
    assert psnr(by_tiny, by_full) > 27 and psnr(by_tiny, frames) > psnr(by_full, frames) - 2


@pytest.mark.slow
def test_the_one_step_model_moves_bodies_from_the_first_frame_on():
    """Nearer to a legal future than the still image is, and different for another seed."""
    world = World(**SCENES)
    truth, labels = world.batch(range(4), "heldout")
    sampler = Sampler.load("world")
    clips = sampler(truth[:, 0])
    assert clips.shape == truth.shape and sampler.trained_size == (32, 32)
    assert sampler.noise_aug_strength == 0  # as in training
    still = np.repeat(truth[:, :1], world.num_frames, axis=1)
    far, near = (
        np.mean([nearest_future(world, label, clip)[0] for label, clip in zip(labels, x, strict=True)])
        for x in (still, clips)
    )
    assert near < 0.85 * far
    assert psnr(clips[:, 0], truth[:, 0]) > 20
    assert np.abs(clips.astype(int) - sampler(truth[:, 0], seed=10)).max() > 50

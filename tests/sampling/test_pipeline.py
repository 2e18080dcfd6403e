"""Images to frames: our sampler compared with the whole StableVideoDiffusionPipeline, with the same noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.sampling.sampler import Sampler
from tests.conftest import error
from tests.support import golden
from tests.support.golden import FRAMES, IDS, RUNS, SIZE


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return golden.pipeline_images()


@pytest.fixture(scope="module")
def sampler(model_folder) -> Sampler:
    return Sampler.load(model_folder)


@pytest.fixture(scope="module")
def start() -> np.ndarray:
    return golden.pipeline_noise()[0]


@pytest.fixture(scope="module")
def condition(sampler, images) -> dict:
    """Returns our conditions, with the pixel noise of the pipeline."""
    return sampler.condition(images, SIZE, None, IDS, noise=golden.pipeline_noise()[1])


@pytest.mark.parametrize("name", ["one_step", pytest.param("guided_steps", marks=pytest.mark.slow)])
def test_latents(sampler, condition, start, name):
    steps, guidance = RUNS[name]
    expected = golden.load("pipeline")[name]
    peak, rms = error(sampler.latents(condition, start, steps=steps, guidance=guidance), expected)
    assert peak <= 1e-4 and rms <= 2e-5, (peak, rms)

    wrong = condition | {"cond_latent": 0.18215 * condition["cond_latent"]}
    assert error(sampler.latents(wrong, start, steps=steps, guidance=guidance), expected)[0] > 5e-2


@pytest.mark.slow
def test_frames(sampler, pipe, reference):
    """Our decoding of the pipeline's one-step latents equals its own."""
    import torch

    latents = golden.load("pipeline")["one_step"]
    with torch.no_grad():  # one clip per chunk: a larger chunk would mix the clips of the batch
        decoded = pipe.decode_latents(reference.to_torch(latents, torch.float32), FRAMES, decode_chunk_size=FRAMES)
    frames = pipe.video_processor.postprocess_video(decoded, output_type="np") * 255
    difference = np.abs(np.asarray(sampler.codec.decode(latents), np.float64) - frames)
    assert difference.max() <= 1.5 and difference.mean() <= 0.3  # rounding alone makes 0.25


@pytest.mark.slow
def test_call_is_its_parts(sampler, images, start):
    """`Sampler(...)` equals condition, denoising and decoding with fps - 1; sizes of other images have no effect."""
    call = dict(noise=start, height=SIZE[0], width=SIZE[1], fps=7, motion_bucket_id=90, noise_aug_strength=0.0)
    frames = sampler(images, **call)
    assert frames.shape == (2, FRAMES, *SIZE, 3) and frames.dtype == np.uint8
    still = jnp.zeros((2, *SIZE, 3))
    condition = sampler.condition(images, SIZE, None, (6, 90, 0.0), noise=still)
    np.testing.assert_array_equal(frames, sampler.codec.decode(sampler.latents(condition, start)))
    mixed = sampler.condition([images[0], images[1][:64, :80]], SIZE, None, (6, 90, 0.0), noise=still)
    for name in condition:
        np.testing.assert_allclose(mixed[name][0], condition[name][0], atol=1e-5, err_msg=name)
    assert np.abs(mixed["image_embed"][1] - condition["image_embed"][1]).max() > 1e-3

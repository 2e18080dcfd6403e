"""Whole videos: `Sampler(...)` against StableVideoDiffusionPipeline on 14 frames."""

import numpy as np
import pytest

from sfv_jax.sampler import Sampler
from tests.conftest import noise

SIZE, FRAMES = (40, 56), 14  # 5 x 7 latents: neither side divides by the UNet's scale, so its levels are resized
MICRO = dict(fps=9, motion_bucket_id=90, noise_aug_strength=0.0)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def start() -> np.ndarray:
    return noise(1, 2, FRAMES, SIZE[0] // 8, SIZE[1] // 8, 4)


@pytest.fixture(scope="module")
def sampler(model_folder) -> Sampler:
    return Sampler.load(model_folder)


@pytest.mark.parametrize(("steps", "guidance"), [(1, None), (4, (1.0, 3.0)), (25, (1.5, 3.0))])
def test_frames_are_the_pipelines(sampler, pipe, reference, images, start, steps, guidance):
    """After rounding, no value of any frame is more than one grey level of 255 apart."""
    import torch
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    low, high = guidance or (1.0, 1.0)
    expected = pipe(
        [Image.fromarray(image) for image in images],
        height=SIZE[0],
        width=SIZE[1],
        num_frames=FRAMES,
        num_inference_steps=steps,
        min_guidance_scale=low,
        max_guidance_scale=high,
        latents=reference.to_torch(start, torch.float32),
        decode_chunk_size=FRAMES,  # one clip per chunk: diffusers' chunks do not stop at the end of a clip
        output_type="np",
        **MICRO,
    ).frames
    found = sampler(
        images,
        height=SIZE[0],
        width=SIZE[1],
        num_frames=FRAMES,
        steps=steps,
        guidance=guidance,
        noise=start,
        **MICRO,
    )
    assert found.shape == (2, FRAMES, *SIZE, 3) and found.std() > 20
    difference = np.abs(found.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.02, (difference.max(), difference.mean())

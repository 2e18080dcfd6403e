"""Videos of 14 frames: `Sampler(...)` against StableVideoDiffusionPipeline, and AnimateLCM's loop in torch."""

import jax
import numpy as np
import pytest

from sfv_jax.diffusion.solvers import step_noise
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.sampling.soundness import NonFiniteError
from tests.conftest import error, noise

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


@pytest.mark.parametrize(
    ("steps", "guidance"),
    [
        pytest.param(1, None, marks=pytest.mark.short),
        pytest.param(25, (1.5, 3.0), marks=pytest.mark.slow),
    ],
)
def test_frames_are_the_pipelines(sampler, pipe, reference, images, start, steps, guidance):
    """After rounding, no pixel differs by more than one gray level of 255."""
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
    assert found.shape == (2, FRAMES, *SIZE, 3) and found.std() > 10  # not a flat picture
    difference = np.abs(found.astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= 1 and difference.mean() < 0.02, (difference.max(), difference.mean())


@pytest.mark.slow
def test_animatelcm(sampler, pipe, reference, images, start):
    """Latents equal those of the published loop in torch (x0 by EDM, then fresh noise) on every tenth of 40 levels."""
    import torch
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(0.002, 700.0, 1.0, prediction_type="v_prediction")
    scheduler.set_timesteps(40)
    levels = torch.cat([scheduler.sigmas[:40:10], torch.zeros(1)])
    keys = jax.random.split(jax.random.key(5), 2)
    condition = sampler.condition(images, SIZE, None, (8, 90, 0.0), noise=np.zeros((2, *SIZE, 3), np.float32))
    latent = reference.to_torch(condition["cond_latent"], torch.float32)[:, None].repeat(1, FRAMES, 1, 1, 1)
    context, ids = (torch.from_numpy(np.array(condition[k])) for k in ("image_embed", "ids"))
    weights = torch.linspace(1.0, 1.2, FRAMES)[:, None, None, None]
    x = reference.to_torch(start, torch.float32) * scheduler.init_noise_sigma
    for n in range(4):
        scaled = scheduler.precondition_inputs(x, levels[n])
        c_noise = scheduler.precondition_noise(levels[n]).expand(2)
        with torch.no_grad():
            blank, raw = (
                pipe.unet(torch.cat([scaled, k * latent], 2), c_noise, k * context[:, None], ids, return_dict=False)[0]
                for k in (0, 1)
            )
        x = scheduler.precondition_outputs(x, blank + weights * (raw - blank), levels[n])
        fresh = step_noise(keys, n, start.shape[1:])
        x = x + levels[n + 1] * reference.to_torch(fresh, torch.float32)
    found = sampler.latents(condition, start, steps=4, guidance=(1.0, 1.2), sampler="animatelcm", keys=keys)
    peak, rms = error(found, reference.to_numpy(x))
    assert peak <= 5e-4 and rms <= 1e-4, (peak, rms)


PLANTED = {
    "CLIP embedding of video 0, 1 not finite .image encoder": ("image_encoder",),
    "conditioning latent of video 0, 1 not finite .VAE encoder": ("vae", "encoder"),
    "denoised latents of video 0, 1 not finite .UNet in float32": ("unet",),
    "decoded frames of video 0, 1 not finite .VAE decoder in float32": ("vae", "decoder"),
}


@pytest.mark.parametrize("message", PLANTED)
def test_nan_in_a_network_is_named(sampler, images, start, monkeypatch, message):
    parts = sampler.codec.params | {"unet": sampler.params}
    below = parts
    for name in PLANTED[message]:
        below = below[name]
    first = jax.tree.leaves(below)[0]
    broken = jax.tree.map(lambda x: x * np.nan if x is first else x, parts)
    monkeypatch.setattr(sampler, "params", broken["unet"])
    monkeypatch.setattr(sampler.codec, "params", broken)
    with pytest.raises(NonFiniteError, match=message):
        sampler(images, height=SIZE[0], width=SIZE[1], num_frames=FRAMES, noise=start, **MICRO)


@pytest.mark.slow
def test_a_mesh_makes_the_same_frames(smallest_model_folder, images, monkeypatch):
    """Two devices share the batch and two the parameters, also those of VAE and CLIP."""
    sampler = Sampler.load(smallest_model_folder)
    monkeypatch.setattr("sfv_jax.runtime.sharding.SMALL", 0)
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    meshed = Sampler.load(smallest_model_folder, mesh=mesh, decode_pixels=0)
    assert meshed.codec.decoder.pixels == 0
    for params in (meshed.params, *meshed.codec.params.values()):
        assert any(not x.is_fully_replicated for x in jax.tree.leaves(params))
    call = dict(height=32, width=32, num_frames=2, seed=[3, 9])
    found, expected = meshed(images, **call), sampler(images, **call)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1

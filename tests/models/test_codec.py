"""The codecs: SVD's against the steps of diffusers' pipeline, patches against the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.checkpoints.model_folder import load_codec
from sfv_jax.models import codec, decoders
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.vae import VAEConfig
from sfv_jax.runtime import sharding
from tests.conftest import error, noise


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def svd(model_folder):
    return load_codec(model_folder)


def test_condition_is_the_pipelines(svd, pipe, reference):
    torch = pytest.importorskip("torch")
    from PIL import Image

    image, original, epsilon = pixels(0, 1, 32, 48, 3), pixels(1, 1, 300, 260, 3), noise(2, 1, 32, 48, 3)
    latent, embed = svd.condition(image, None, 0.05, noise=epsilon, original=original)
    noisy = pipe.video_processor.preprocess(Image.fromarray(image[0])) + 0.05 * reference.to_torch(
        epsilon, torch.float32
    )
    expected = pipe._encode_vae_image(noisy, "cpu", 1, do_classifier_free_guidance=False)
    assert error(latent, reference.to_numpy(expected))[1] <= 2e-5
    expected = pipe._encode_image(Image.fromarray(original[0]), "cpu", 1, do_classifier_free_guidance=False)
    assert error(embed, expected[:, 0].double().numpy())[1] <= 1e-4  # the reference resizes with fp32 coordinates


def test_decode_is_the_pipelines(svd, pipe, reference):
    torch = pytest.importorskip("torch")
    latents = noise(3, 2, 3, 4, 6, 4)
    with torch.no_grad():
        # Chunks of one clip each: a larger chunk would mix the clips of the batch.
        frames = pipe.decode_latents(reference.to_torch(latents, torch.float32), 3, decode_chunk_size=3)
    expected = pipe.video_processor.postprocess_video(frames, output_type="np") * 255
    found = np.asarray(svd.decode(latents), np.float64)
    assert found.shape == (2, 3, 32, 48, 3)
    assert np.abs(found - expected).max() <= 0.5 + 1e-2


@pytest.mark.slow
def test_a_sample_ignores_its_neighbours(svd):
    images, keys = pixels(4, 2, 32, 48, 3), jax.random.split(jax.random.key(0), 2)
    together, alone = svd.condition(images, keys, jnp.array([0.5, 0.02])), svd.condition(images[1:], keys[1:], 0.02)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1:], b, atol=1e-5)
    np.testing.assert_allclose(svd.encode(images[:, None])[:, 0], svd.condition(images, keys, 0.0)[0], atol=1e-5)
    with pytest.raises(ValueError, match="one random key per image"):
        svd.condition(images, jax.random.key(0), 0.02)


@pytest.mark.slow
def test_frames_are_encoded_in_chunks(svd):
    """Three frames encoded one at a time, and two at a time with a padded rest, have the same latents."""
    frames = pixels(7, 2, 3, 32, 48, 3)
    whole = svd.encode(frames)
    for size in (1, 2):
        np.testing.assert_allclose(svd.encode(frames, size), whole, atol=1e-5)


@pytest.mark.slow
def test_decoding_in_chunks_is_the_pipelines(svd, pipe, reference):
    """14 frames in chunks of 4, 4, 4 and 2 equal diffusers' chunks, and differ from the clip decoded whole."""
    torch = pytest.importorskip("torch")
    latents = noise(8, 1, 14, 4, 6, 4)
    with torch.no_grad():
        frames = pipe.decode_latents(reference.to_torch(latents, torch.float32), 14, decode_chunk_size=4)
    expected = pipe.video_processor.postprocess_video(frames, output_type="np") * 255
    found = np.asarray(svd.decode(latents, 4), np.float64)
    assert np.abs(found - expected).max() <= 0.5 + 1e-2
    assert np.abs(found[:, :4] - svd.decode(latents[:, :4])).max() <= 1
    assert np.abs(found[:, 4:6] - svd.decode(latents[:, 2:6])[:, 2:]).max() > 5  # neighbours matter
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        svd.decode(latents, 0)


def test_patches_lose_nothing():
    codec, frames = PatchCodec(scaling_factor=1.7, offset=-0.3), pixels(5, 2, 3, 32, 32, 3)
    latents = codec.encode(frames)
    assert latents.shape == (2, 3, 8, 8, codec.latent_channels) and codec.downscale == 4
    assert np.array_equal(codec.decode(latents * codec.scaling_factor), frames)


def test_patch_condition():
    codec, images = PatchCodec(), pixels(6, 2, 32, 32, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    latent, embed = codec.condition(images, keys, 0.0)
    np.testing.assert_allclose(latent, codec.encode(images[:, None])[:, 0], atol=1e-6)
    assert embed.shape == (2, 48)
    np.testing.assert_allclose(embed[0, :3], images[0, :8, :8].mean((0, 1)) / 127.5 - 1, atol=1e-5)
    noisy, clean = codec.condition(images, keys, 0.1)
    assert 0.09 < np.std(noisy - latent) < 0.11 and np.array_equal(clean, embed)
    np.testing.assert_allclose(codec.condition(images[1:], keys[1:], 0.1)[0], noisy[1:], atol=1e-6)


def test_frames_are_decoded_in_pieces_where_memory_is_short():
    """As compiled for accelerators, 14 frames of 576x1024 need about 10 GB at once in bf16."""
    config, latents = VAEConfig.svd(), (1, 14, 72, 128, 4)
    for gib, pieces in ((16, True), (31, True), (80, False), (141, False), (None, True)):
        memory = gib and gib * 2**30
        assert (decoders.decode_pixels(config, latents, jnp.bfloat16, memory) > 0) == pieces, gib
    assert decoders.decode_pixels(config, latents, jnp.float32, 60 * 2**30) > 0
    assert decoders.decode_pixels(config, (4, *latents[1:]), jnp.bfloat16, 80 * 2**30) > 0
    mesh = sharding.make_mesh(1, 1, 8)
    shared = sharding.on_mesh(mesh, decoders.decode_pixels)
    assert shared(config, latents, jnp.bfloat16, 8 * 2**30) == 0


def test_pieces_can_be_chosen():
    """`pixels` overrides the choice by memory; 0 decodes all at once."""
    for pixels in (None, 0, 77):
        svd = codec.SVDCodec(VAEConfig.tiny(), CLIPConfig.tiny(), {"vae": None}, pixels=pixels, memory=1e3)
        used = []
        svd.decoder._decode = lambda params, latents, pieces, used=used: used.append(pieces) or (latents, None)
        svd.decode(np.zeros((1, 2, 8, 8, 4), np.float32))
        assert used == [VAEConfig.tiny().decode_pixels if pixels is None else pixels]
    with pytest.raises(ValueError, match="decode_pixels -1: give the pixels of a piece, or 0"):
        codec.SVDCodec(VAEConfig.tiny(), CLIPConfig.tiny(), {}, pixels=-1)

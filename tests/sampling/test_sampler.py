"""Guarantees of the sampler: seeds, compilation, and errors with a remedy."""

import contextlib
import re
from copy import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfv_jax.data.images import fitted
from sfv_jax.diffusion import edm
from sfv_jax.diffusion.solvers import guidance_ramp, sample, step_noise
from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.networks import Networks
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.runtime.commands import numbers, seeds
from sfv_jax.runtime.sharding import make_mesh, param_shardings
from sfv_jax.sampling.inputs import fitting_size
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.sampling.soundness import NonFiniteError
from tests.conftest import noise
from tests.support import small_run

UNET = UNetConfig(**small_run.UNET | dict(in_channels=24, out_channels=12, num_frames=3, temporal_conv="matmul"))
CODEC = PatchCodec(patch=2, embed_cell=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def random_weights(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(UNET, random_weights(Networks(UNET).abstract["generator"]), CODEC)


@pytest.fixture(scope="module")
def pair(sampler) -> np.ndarray:
    return sampler(IMAGES, seed=[7, 40])


def assert_same_frames(found, expected):
    """Checks that pixels differ by at most one gray level: programs for other batch sizes round differently."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.slow
def test_a_video_depends_on_its_own_seed_only(sampler, pair):
    assert pair.shape == (2, 3, 8, 8, 3)
    for n, seed in enumerate([7, 40]):
        assert_same_frames(sampler(IMAGES[n : n + 1], seed=seed), pair[n : n + 1])
    other = sampler(IMAGES, seed=[7, 41])
    assert_same_frames(other[:1], pair[:1])
    assert np.abs(other[1].astype(int) - pair[1]).max() > 10


def test_streamed_frames_are_those_of_the_video(sampler, pair):
    times, entered = {}, []
    streamed = sampler.stream(IMAGES[0], seed=7, times=times, enter=lambda name, new: entered.append(name))
    assert_same_frames(np.stack(list(streamed))[None], pair[:1])
    assert entered == list(times) == ["clip", "encode", "denoise", "decode"] and min(times.values()) > 0
    with pytest.raises(UserError, match="seeds are whole numbers"):
        sampler.stream(IMAGES[0], seed=-1)


def test_seeds_count_up(sampler):
    np.testing.assert_array_equal(sampler(IMAGES, seed=7), sampler(IMAGES, seed=[7, 8]))


def test_micro_conditions_matter(sampler, pair):
    for change in (dict(fps=20), dict(motion_bucket_id=5), dict(noise_aug_strength=0.5)):
        assert np.abs(sampler(IMAGES, seed=[7, 40], **change).astype(int) - pair).max() > 1, change


def test_known_shapes_are_not_compiled_again(sampler, pair):
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(name) if "backend_compile" in name else None
    )
    sampler(IMAGES[::-1], seed=[1, 2], fps=12, noise_aug_strength=0.1)
    assert not compilations  # in no stage
    sampler(IMAGES, num_frames=2)
    assert compilations


@pytest.mark.slow
def test_any_batch_and_length(sampler):
    """For any length and batch, shape and dtype are right, and a permuted batch gives the permuted result."""

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(t=st.integers(1, 3), order=st.permutations(range(3)), size=st.sampled_from([(8, 8), (4, 16)]))
    def holds(t, order, size):
        images = np.random.default_rng(2).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
        call = dict(num_frames=t, height=size[0], width=size[1])
        videos = sampler(images, seed=[3, 4, 5], **call)
        assert videos.shape == (3, t, *size, 3) and videos.dtype == np.uint8
        assert_same_frames(sampler(images[order], seed=[3 + n for n in order], **call), videos[order])

    holds()


@pytest.mark.slow
def test_a_mesh_changes_nothing(sampler, monkeypatch):
    """Three images on eight devices (a batch padded to four, parameters over two) give the frames of one device."""
    monkeypatch.setattr("sfv_jax.runtime.sharding.SMALL", 0)  # these parameters are too small to be sharded
    images = np.concatenate([IMAGES, IMAGES[:1]])
    mesh = make_mesh(data=2, fsdp=2, spatial=2)
    params = jax.device_put(sampler.params, param_shardings(mesh, sampler.params))
    assert any(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in jax.tree.leaves(params))
    call = dict(seed=[7, 40, 9], steps=2, sampler="sfv", guidance=(1.0, 2.0))
    found = Sampler(UNET, params, CODEC, mesh=mesh)(images, **call)
    assert_same_frames(found, sampler(images, **call))


@pytest.mark.slow
def test_a_video_over_eight_devices():
    """CLIP, VAE and a two-level UNet with `spatial=8` give the frames of one device.

    Devices share the rows of 24 x 16 pixels, the columns of 12 x 8 cells and nothing at 6 x 4.
    """
    unet = replace(UNET, in_channels=8, out_channels=4, block_out_channels=(16, 16), num_attention_heads=(2, 2))
    vae = VAEConfig.tiny(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, decode_pixels=20)
    clip = CLIPConfig.tiny(projection_dim=unet.cross_attention_dim)
    shapes = {"vae": tree.abstract(TemporalVAE, vae)[1], "image_encoder": tree.abstract(CLIPVision, clip)[1]}
    params = random_weights(shapes | {"unet": Networks(unet).abstract["generator"]})

    def sampler(params, mesh=None) -> Sampler:
        return Sampler(unet, params["unet"], SVDCodec(vae, clip, params), mesh=mesh)

    mesh = make_mesh(1, 1, 8)
    shared = sampler(jax.device_put(params, param_shardings(mesh, params)), mesh)
    made = []
    whole = shared.generator
    generate, whole._generate = whole._generate, lambda *args: made.append(generate(*args)) or made[-1]
    call = dict(seed=7, height=24, width=16)
    assert_same_frames(shared(IMAGES[:1], **call), sampler(params)(IMAGES[:1], **call))
    assert made[0].sharding.shard_shape(made[0].shape)[1:4] == (3, 12, 1)


def linear(gain: float):
    """Returns a network whose raw output is linear in input and context, so that samplers can be computed by hand."""
    return lambda x, c_noise, context, ids: gain * x[..., :2] + context[:, None, None, None, :]


def by_hand(start, sigmas, network, condition, weights, fresh):
    """Computes the sampler in numpy, float64, one level after the other."""
    x = np.float64(start) * np.sqrt(sigmas[0] ** 2 + 1)
    for n, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        inputs = np.concatenate(
            [x / np.sqrt(sigma**2 + 1), np.broadcast_to(condition["cond_latent"][:, None], x.shape)], -1
        )
        context = np.float64(condition["image_embed"])
        raw = network(inputs, None, context, None)
        if weights is not None:
            inputs[..., 2:] = 0
            blank = network(inputs, None, 0 * context, None)
            raw = blank + weights[:, None, None, None] * (raw - blank)
        x0 = x / (sigma**2 + 1) - sigma / np.sqrt(sigma**2 + 1) * raw
        x = x + (x - x0) / sigma * (following - sigma) if fresh is None else x0 + following * fresh[n]
    return x


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("weights", [None, (1.0, 3.0), (1.0, 2.5), (1.5, 3.0)])
def test_samplers_by_hand(fresh, weights):
    condition = {"cond_latent": noise(1, 2, 2, 3, 2), "image_embed": noise(2, 2, 2), "ids": jnp.ones((2, 3))}
    start, keys = noise(3, 2, 4, 2, 3, 2), jax.random.split(jax.random.key(0), 2)
    sigmas = edm.consistency_sigmas(4) if fresh else edm.sampling_sigmas(4)
    ramp = guidance_ramp(weights, 4)
    drawn = [np.asarray(step_noise(keys, n, start.shape[1:]), np.float64) for n in range(4)] if fresh else None
    found = sample(linear(0.3), start, condition, sigmas, ramp, keys if fresh else None)
    expected = by_hand(
        start, np.float64(sigmas), linear(0.3), condition, None if ramp is None else np.linspace(*weights, 4), drawn
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


def test_levels_of_the_samplers():
    np.testing.assert_allclose(edm.few_step_sigmas(3), [700, 70.54084, 2.269116, 0], rtol=1e-6)
    np.testing.assert_allclose(edm.few_step_sigmas(1), [700, 0], rtol=1e-6)
    np.testing.assert_allclose(edm.consistency_sigmas(4), [700, 128.564, 13.6784, 0.496878, 0], rtol=1e-5)
    eight = [700, 315.74, 128.56, 45.851, 13.678, 3.1666, 0.49688, 0.039754, 0]
    np.testing.assert_allclose(edm.consistency_sigmas(8), eight, rtol=5e-5)
    for steps in (1, 3, 7, 40):
        levels = edm.consistency_sigmas(steps)
        assert len(levels) == steps + 1 and (np.diff(levels) < 0).all()


@pytest.mark.slow
def test_fresh_noise_belongs_to_the_seed(sampler):
    call = dict(noise=noise(3, 2, 3, 4, 4, 12), noise_aug_strength=0.0, steps=2)
    renoised = sampler(IMAGES, seed=[7, 40], sampler="sfv", **call)
    assert_same_frames(renoised[1:], sampler(IMAGES[1:], seed=40, sampler="sfv", **call | {"noise": call["noise"][1:]}))
    other = sampler(IMAGES, seed=[7, 41], sampler="sfv", **call)
    np.testing.assert_array_equal(other[0], renoised[0])
    assert np.abs(other[1].astype(int) - renoised[1]).max() > 5
    still = dict(sampler="sfv_euler", **call)
    np.testing.assert_array_equal(sampler(IMAGES, seed=[7, 40], **still), sampler(IMAGES, seed=[1, 2], **still))


def test_a_ramp_of_ones_is_not_paid_for():
    assert guidance_ramp(None, 3) is None and guidance_ramp((1.0, 1.0), 3) is None
    np.testing.assert_array_equal(guidance_ramp((1.0, 3.0), 3), [1, 2, 3])
    np.testing.assert_array_equal(guidance_ramp((2.0, 1.0), 3), [2, 1.5, 1])  # diffusers silently drops this one
    for wrong in ((0.0, 1.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="one end must exceed 1"):
            guidance_ramp(wrong, 3)
    for wrong in ((1.0, float("nan")), (3.0,), (-1.0, 3.0)):
        with pytest.raises(ValueError, match="weights of the first and the last frame"):
            guidance_ramp(wrong, 3)


def test_times_are_those_of_the_stages(sampler):
    times = {}
    sampler(IMAGES, seed=[7, 40], times=times)
    assert list(times) == ["clip", "encode", "denoise", "decode"] and min(times.values()) > 0


def test_nan_is_named(sampler):
    call = dict(noise=noise(3, 2, 3, 4, 4, 12))
    call["noise"][1, 0, 0, 0, 0] = np.nan
    with pytest.raises(
        NonFiniteError, match=r"denoised latents of video 1 not finite \(UNet in float32\): the weights"
    ):
        sampler(IMAGES, **call)
    assert Sampler(UNET, sampler.params, CODEC, check_finite=False)(IMAGES, **call).shape == (2, 3, 8, 8, 3)


def test_images_are_stretched_to_the_size_asked_for(sampler):
    large = [np.repeat(np.repeat(image, 3, axis=0), 2, axis=1) for image in IMAGES]
    assert sampler(large, height=8, width=8, seed=[7, 40]).shape == (2, 3, 8, 8, 3)
    assert sampler.size((9, 13), None, None) == (8, 12)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_images_of_another_shape(sampler, fit):
    """CLIP and the VAE get the same picture, that of the video; `stretch` is the default."""
    image = np.random.default_rng(3).integers(0, 256, (16, 12, 3), np.uint8)
    size = dict(height=8, width=8)
    shown = fitted(image, 8, 8, fit)
    np.testing.assert_array_equal(sampler([image], fit=fit, **size), sampler([shown], **size))
    plain = sampler([image], **size)
    np.testing.assert_array_equal(plain, sampler([image], fit="stretch", **size))
    assert (plain != sampler([image], fit=fit, **size)).any()


def test_watched_sampling_is_the_same_and_shows_each_step(sampler, pair, capsys):
    """The step that a watcher counts is one program, whatever the number of steps."""
    seen: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def watch(count, what):
        seen.append((what, count))
        yield lambda done: seen.append(("done", done))

    for kind in ("sfv", "euler"):
        call = dict(seed=[7, 40], steps=3, sampler=kind, guidance=(1.0, 2.0))
        assert_same_frames(sampler(IMAGES, watch=watch, **call), sampler(IMAGES, **call))
        assert seen == [("sampling steps", 3), *[("done", 1)] * 3]
        seen.clear()
    said = capsys.readouterr().out
    assert said.count("compiling UNet, 3 frames of 8x8 in 3 steps ...") == 2
    sampler(IMAGES, watch=watch, **call)
    assert not capsys.readouterr().out  # known programs


def test_given_noise_replaces_the_seed(sampler):
    start = noise(3, 2, 3, 4, 4, 12)
    call = dict(noise=start, noise_aug_strength=0.0)
    np.testing.assert_array_equal(sampler(IMAGES, seed=0, **call), sampler(IMAGES, seed=5, **call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(height=9), "height 9 is not a multiple of 2; nearest: 8 and 10"),
        (dict(width=1), "width 1 is not a multiple of 2; nearest: 2"),
        (dict(sampler="ddim"), "sampler 'ddim': choose one of euler, sfv, sfv_euler, animatelcm"),
        (dict(sampler="sfv", steps=4), "samples in 1 to 3 steps, got 4"),
        (dict(sampler="animatelcm", steps=41), "samples in 1 to 40 steps, got 41"),
        (dict(seed=[1, 2, 3]), "2 images need as many seeds, got 3"),
        (dict(width=12), "images of 8x12 are embedded in 18 numbers, the UNet takes 12"),
        (dict(noise=np.zeros((2, 3, 4, 5, 12))), r"has shape \(2, 3, 4, 5, 12\), these images need \(2, 3, 4, 4, 12\)"),
    ],
)
def test_errors(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(IMAGES, **changes)


RGB = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((8, 8, 3))], "image 0 must be uint8 [h, w, 3], RGB, got float64 [8, 8, 3]: convert its pixels"),
        ([RGB, np.ones((8, 8, 3), np.float32)], "image 1 must be uint8 [h, w, 3], RGB, got float32 [8, 8, 3]: convert"),
        ([np.full((8, 8, 3), 999, np.int64)], "got int64 [8, 8, 3]: convert its pixels to 0..255, np.uint8"),
        ([RGB > 0], "got bool [8, 8, 3]: convert its pixels to 0..255, np.uint8"),
        ([RGB[..., 0]], "got uint8 [8, 8]: repeat a gray channel three times"),
        ([RGB[..., :1]], "got uint8 [8, 8, 1]: repeat a gray channel three times"),
        ([np.zeros((8, 8, 4), np.uint8)], "got uint8 [8, 8, 4]: put RGBA over a background and drop its alpha"),
        (RGB, "image 0 must be uint8 [h, w, 3], RGB, got uint8 [8, 3]: put a single image into a list"),
        ([RGB.transpose(2, 0, 1)], "got uint8 [3, 8, 8]: channels come last"),
        ([RGB[None]], "got uint8 [1, 8, 8, 3]: channels come last, and a batch is a sequence of images"),
        ([RGB[:0]], "got uint8 [0, 8, 3]"),
        (["in.png"], "image 0 must be uint8 [h, w, 3], RGB, got <U6 []"),
        ([], "no images"),
    ],
)
def test_images_must_be_pixels(sampler, images, message):
    calls = [lambda: sampler(images), lambda: sampler.condition(images, (8, 8), None, (6, 127, 0))]
    for call in calls:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "seed", [-1, 2**32, 10**30, 1.5, [0, 2**32], [0, -1], [True, 0], ["0", "1"], float("nan")], ids=str
)
def test_seeds_that_jax_would_cut(sampler, seed):
    with pytest.raises(UserError, match="seeds are whole numbers from 0 to 4294967295, got"):
        sampler(IMAGES, seed=seed)
    with pytest.raises(UserError, match="seeds are whole numbers"):
        sampler(IMAGES, seed=2**32 - 1)  # that of the second image is too large


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        Sampler.load(tmp_path, dtype="int8")


def test_seeds_of_a_flag():
    assert seeds(["0", "12"]) == (0, 12)
    for values in (["a"], ["-1"], ["1.5"], ["0", ""], [], [str(2**32)]):
        with pytest.raises(UserError, match=f"--seeds={','.join(values)}: give whole numbers from 0 to 4294967295"):
            seeds(values)


def test_numbers_of_a_flag():
    assert numbers("mesh", ["1", "1", "8"]) == (1, 1, 8) and numbers("mesh", ["4", "2"]) == (4, 2)
    assert numbers("guidance", []) is None
    for name, values in (("guidance", ["1", "2", "3"]), ("mesh", ["1"]), ("mesh", ["a", "b"]), ("mesh", ["0", "1"])):
        with pytest.raises(UserError, match=f"--{name}={','.join(values)}: give two"):
            numbers(name, values)


def test_the_default_size_is_that_of_the_training_or_has_the_shape_of_the_image(sampler):
    """SVD's own size for a photograph of the same shape, whatever its number of pixels."""
    assert fitting_size((9, 13), 96, 4) == (8, 12)
    for photo in ((576, 1024), (1080, 1920), (4320, 7680)):
        assert fitting_size(photo, 96, 8) == (576, 1024)
    assert fitting_size((1920, 1080), 96, 8) == (1024, 576)
    assert fitting_size((1, 10**5), 96, 8) == (8, 96 * 96 * 8)
    trained = copy(sampler)
    trained.trained_size = (12, 8)
    assert trained.size((100, 100), None, None) == (12, 8) and trained.size((100, 100), 16, None) == (16, 8)

"""The distillation of a tiny decoder: its losses by an independent formula, its crops, its critic, its refusals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax import config as defaults
from sfv_jax.errors import UserError
from sfv_jax.methods import decoder as method
from sfv_jax.models import tree
from sfv_jax.models.tiny_decoder import TinyTemporalDecoder
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import TemporalDecoder, TemporalVAE, VAEConfig
from tests.conftest import noise

VAE = VAEConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.5, temporal_conv="matmul"
)
UNET = UNetConfig(
    in_channels=8,
    out_channels=4,
    block_out_channels=(8,),
    num_attention_heads=(1,),
    layers_per_block=1,
    cross_attention_dim=4,
    addition_time_embed_dim=8,
    norm_groups=4,
    temporal_conv="matmul",
)
SHAPE = (2, 3, 4, 5)


def config(**changes):
    made = defaults.decoder()
    made.update(dict(dtype="float32"))
    made.decoder.update(dict(block_out_channels=(6, 4), layers_per_block=(1, 1), crop=0) | changes)
    return made


def batch() -> dict[str, np.ndarray]:
    frames = np.random.default_rng(3).integers(0, 256, (2, 3, 8, 10, 3), np.uint8)
    conditions = {
        "cond_latent": noise(5, 2, 4, 5, 4),
        "image_embed": noise(6, 2, 4),
        "ids": np.ones((2, 3), np.float32),
    }
    return {"latents": noise(4, *SHAPE, 4), "frames": frames} | conditions


def begun(made):
    networks = method.make_networks(method.Teacher(VAE), made)
    params = {"decoder": method.fresh(networks, made), "teacher": tree.init(TemporalDecoder, VAE, 7)}
    return networks, *method.init_state(networks, made, params)


WEIGHTS = dict(l1_weight=0.7, flicker_weight=0.3, feature_weight=0.2, real_weight=0.4)


@pytest.fixture(scope="module")
def plain():
    """Networks, state, frozen parameters, state and metrics after a step with `WEIGHTS`, and the step."""
    made = config(**WEIGHTS)
    made.generator_optimizer.update(lr=3e-3, warmup_steps=0)
    networks, state, frozen = begun(made)
    step = jax.jit(method.make_train_step(networks, made))
    return networks, state, frozen, *step(state, frozen, batch()), step


def test_losses_are_those_of_an_independent_formula(plain):
    networks, state, frozen, _, metrics, _ = plain
    given, student = batch(), {k: v for k, v in state["generator"].items() if k != "projectors"}
    tiny, _ = tree.abstract(TinyTemporalDecoder, networks.config)
    made = np.float64(jax.jit(lambda params, latents: tree.build(tiny, params)(latents))(student, given["latents"]))
    vae, _ = tree.abstract(TemporalVAE, VAE)
    whole = tree.init(TemporalVAE, VAE) | {"decoder": frozen["teacher"]}
    decode = jax.jit(lambda params, latents: tree.build(vae, params).decode(latents / 0.5))
    target = np.float64(decode(whole, given["latents"])).clip(-1, 1) / 2 + 0.5
    expected = {
        "loss/l1": np.abs(made - target).mean(),
        "loss/flicker": np.abs((made[:, 1:] - made[:, :-1]) - (target[:, 1:] - target[:, :-1])).mean(),
        "loss/real_l1": np.abs(made - given["frames"] / 255).mean(),
        "quality/psnr": -10 * np.log10(((made.clip(0, 1) - target) ** 2).mean()),
        "motion/real": ((target[:, 1:] - target[:, :-1]) ** 2).mean(),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-3), name


def test_features_are_matched_as_a_share_of_the_teachers(plain):
    """The lowest level's features, through its projector; the teacher's are what its decoder computes on the way."""
    networks, state, frozen, _, metrics, _ = plain
    given = batch()
    _, found = jax.jit(networks.decode)(state["generator"], given["latents"])
    _, teacher = jax.jit(networks.target)(frozen["teacher"], given["latents"])
    assert networks.matched == len(found) == len(teacher) == 1
    assert found[0].shape == teacher[0].shape == (*SHAPE, 8)
    expected = np.mean(np.square(found[0] - teacher[0])) / np.mean(np.square(teacher[0]))
    assert float(metrics["loss/features"]) == pytest.approx(float(expected), rel=1e-4)
    graph, _ = tree.abstract(TemporalDecoder, VAE)

    @jax.jit
    def lowest_level(params, x):
        vae = tree.build(graph, params)
        return vae.up_blocks[0].resnets[1](vae.up_blocks[0].resnets[0](vae.mid_block(vae.conv_in(x))))

    level = lowest_level(frozen["teacher"], given["latents"] / 0.5)
    np.testing.assert_allclose(teacher[0], level, atol=1e-5)


def test_only_the_student_learns(plain):
    _, before, frozen, after, _, _ = plain
    assert frozen.keys() == {"teacher"} and after.keys() == {"step", "generator", "ema", "opt_g"}
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before["generator"], after["generator"])
    assert all(x > 0 for x in jax.tree.leaves(moved))
    assert int(after["step"]) == 1


def test_the_loss_is_the_weighted_sum(plain):
    """The gradient is that of the sum of all parts, times their weights."""
    networks, state, frozen, _, metrics, _ = plain
    latents, real = batch()["latents"], batch()["frames"] / np.float32(255)

    def total(generator, teacher):
        target, expected = networks.target(teacher, latents)
        made, features = networks.decode(generator, latents)
        share = jnp.mean(jnp.square(features[0] - expected[0])) / jnp.mean(jnp.square(expected[0]))
        motion = jnp.abs(jnp.diff(made, axis=1) - jnp.diff(target, axis=1)).mean()
        return 0.7 * jnp.abs(made - target).mean() + 0.3 * motion + 0.2 * share + 0.4 * jnp.abs(made - real).mean()

    slope = jax.jit(jax.grad(total))(state["generator"], frozen["teacher"])
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(jax.device_get(slope))))
    assert float(metrics["norm/generator_gradient"]) == pytest.approx(float(norm), rel=1e-3)


def test_crops_are_squares_of_latents_and_the_pixels_over_them():
    rows, columns = np.mgrid[:6, :7]
    latents = np.broadcast_to(np.stack([rows, columns], -1)[None, None], (8, 3, 6, 7, 2)).astype(np.float32)
    frames = np.repeat(np.repeat(latents, 2, axis=2), 2, axis=3).astype(np.uint8)
    cut, pixels = method.cropped(jax.random.key(1), latents, frames, 4)
    assert cut.shape == (8, 3, 4, 4, 2) and pixels.shape == (8, 3, 8, 8, 2) and pixels.dtype == jnp.uint8
    np.testing.assert_array_equal(cut, np.asarray(pixels)[:, :, ::2, ::2])
    np.testing.assert_array_equal(cut - cut[:, :, :1, :1], np.broadcast_to(latents[:, :, :4, :4], cut.shape))
    np.testing.assert_array_equal(cut, np.broadcast_to(cut[:, :1], cut.shape))  # the same in all frames
    corners = {tuple(map(int, x)) for x in np.asarray(cut)[:, 0, 0, 0]}
    assert len(corners) > 2  # but not in all samples
    for size in (0, 7, 99):
        whole, none = method.cropped(jax.random.key(1), latents, None, size)
        assert whole is latents and none is None
    assert method.cropped(jax.random.key(1), latents, None, 6)[0].shape == (8, 3, 6, 6, 2)


def test_distillation_approaches_the_teacher(plain):
    _, state, frozen, *_, step = plain
    given, found = batch(), []
    for _ in range(40):
        state, metrics = step(state, frozen, given)
        found.append({k: float(metrics[k]) for k in ("loss/l1", "loss/features", "quality/psnr")})
    assert found[-1]["loss/l1"] < 0.8 * found[0]["loss/l1"] and found[-1]["loss/features"] < found[0]["loss/features"]
    assert found[-1]["quality/psnr"] > found[0]["quality/psnr"] + 1


@pytest.fixture(scope="module")
def with_all():
    """Networks, state, frozen parameters, state and metrics after a step with critic and generated latents, latents."""
    made = config(generated_share=0.5, real_weight=1.0, adv_weight=0.1)
    networks = method.make_networks(method.Teacher(VAE, UNET), made)
    unet = method.Networks(UNET).init_generator(2)
    params = {"decoder": method.fresh(networks, made), "teacher": tree.init(TemporalDecoder, VAE, 7), "unet": unet}
    state, frozen = method.init_state(networks, made, params)
    seen, decode = [], method.DecoderNetworks.decode
    watched = lambda self, params, latents: (jax.debug.callback(seen.append, latents), decode(self, params, latents))[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method.DecoderNetworks, "decode", watched)
        after, metrics = jax.jit(method.make_train_step(networks, made))(state, frozen, batch())
        jax.effects_barrier()
    return networks, state, frozen, after, metrics, np.asarray(seen[0])


@pytest.mark.slow
def test_the_critic_learns_beside_the_student(with_all):
    _, before, _, after, metrics, _ = with_all
    assert {"loss/adversarial", "loss/critic", "loss/r1"} <= metrics.keys()
    assert float(metrics["loss/critic"]) == pytest.approx(np.log(2), abs=0.2) and float(metrics["loss/r1"]) > 0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before["critic"], after["critic"])
    assert all(x > 0 for path, x in tree.flatten(moved).items() if path != "conv_out.bias")  # a constant cancels


@pytest.mark.slow
def test_some_latents_are_those_of_the_generator(with_all):
    """The first half of the batch is replaced by what the UNet makes in one step, and has no real frames."""
    networks, state, frozen, _, metrics, latents = with_all
    assert frozen.keys() == {"teacher", "unet"}
    np.testing.assert_array_equal(latents[1], batch()["latents"][1])
    assert np.isfinite(latents[0]).all() and np.abs(latents[0] - batch()["latents"][0]).max() > 0.1
    frames, _ = jax.jit(networks.decode)(state["generator"], batch()["latents"][1:])
    expected = np.abs(np.asarray(frames) - batch()["frames"][1:] / 255).mean()
    assert float(metrics["loss/real_l1"]) == pytest.approx(float(expected), rel=1e-3)


def test_sizes_follow_the_vae():
    made = config(block_out_channels=(), layers_per_block=())
    assert method.student(VAE, made).block_out_channels == (64, 64)
    deep = replace(VAE, block_out_channels=(8, 8, 8, 8), latent_channels=7)
    found = method.student(deep, made)
    assert (found.latent_channels, found.layers_per_block, found.downscale) == (7, (3, 3, 3, 1), 8)
    with pytest.raises(UserError, match=r"\(6, 4\): the VAE makes 8 pixels of a latent cell, which takes 4 levels"):
        method.student(deep, config())
    with pytest.raises(UserError, match="have 2 and 1 levels"):
        method.student(VAE, config(layers_per_block=(1,)))

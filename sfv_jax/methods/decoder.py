"""Distillation of a tiny temporal decoder from the decoder of a VAE, which is frozen.

No training recipe for SVD's latents is published. The parts are: L1 to the teacher's frames and feature matching
through small projectors (Turbo-VAED), L1 on frame differences, and a patch critic in pixels (TAESD, TAESDV). The
teacher is in the house, so no perceptual network is needed.

State: `step`, `generator` (the decoder, and `projectors`), `ema`, `opt_g`; with a critic also `critic` and `opt_d`.
Frozen: `teacher` (the VAE's decoder), and `unet` if some latents are generated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.errors import UserError
from sfv_jax.methods import optim
from sfv_jax.methods.common import (
    accumulate,
    frozen_copy,
    generator_state,
    step_key,
    update_generator,
    warmed_decay,
    watch,
)
from sfv_jax.models import tree
from sfv_jax.models.distillation import CriticConfig, PatchCritic, Projectors, ProjectorsConfig
from sfv_jax.models.networks import DTYPES, Networks, Params
from sfv_jax.models.tiny_decoder import VARIANTS, TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import TemporalDecoder, VAEConfig
from sfv_jax.runtime.seeds import stream

Array = jax.Array
SUBJECT = "decoder"


@dataclass(frozen=True)
class Teacher:
    """The model that is distilled: its VAE, and its UNet if that generates latents."""

    vae: VAEConfig
    unet: UNetConfig | None = None


@dataclass(frozen=True)
class DecoderNetworks:
    """Student, projectors, critic and teacher as functions of their parameters; all compute in `dtype`.

    Attributes:
      config: the student.
      teacher: the model that is distilled.
      abstract: shapes of the parameters by network; "generator" is what is trained.
    """

    config: TinyDecoderConfig
    teacher: Teacher
    dtype: str
    abstract: dict[str, Params] = field(init=False, compare=False)
    graphs: dict[str, Any] = field(init=False, compare=False)

    def __post_init__(self):
        dtype, vae = DTYPES[self.dtype], replace(self.teacher.vae, decode_pixels=0)
        made: dict[str, tuple] = {
            "decoder": tree.abstract(TinyTemporalDecoder, self.config, dtype=dtype),
            "projectors": tree.abstract(Projectors, self.projectors, dtype=dtype),
            "critic": tree.abstract(PatchCritic, self.critic, dtype=dtype),
            "teacher": tree.abstract(TemporalDecoder, vae, dtype=dtype),
        }
        shapes: dict[str, Params] = {name: shapes for name, (_, shapes) in made.items()}
        shapes["generator"] = shapes["decoder"] | {"projectors": shapes["projectors"]}
        object.__setattr__(self, "graphs", {name: graph for name, (graph, _) in made.items()})
        object.__setattr__(self, "abstract", shapes)

    @property
    def matched(self) -> int:
        """Number of levels whose features are matched: all but that of the pixels, which the losses on frames cover."""
        return max(len(self.config.block_out_channels) - 1, 1)

    @property
    def projectors(self) -> ProjectorsConfig:
        """Widths of the projectors."""
        teacher = self.teacher.vae.block_out_channels[::-1]
        return ProjectorsConfig(self.config.block_out_channels[: self.matched], teacher[: self.matched])

    @property
    def critic(self) -> CriticConfig:
        """Sizes of the critic."""
        return CriticConfig(self.config.out_channels)

    def decode(self, params: Params, latents: Array) -> tuple[Array, list[Array]]:
        """Returns the student's frames, fp32 and nominally in [0, 1], and its projected features."""
        decoder = tree.build(self.graphs["decoder"], {k: v for k, v in params.items() if k != "projectors"})
        b, _, h, w, _ = latents.shape
        frames, levels, _ = decoder.features(latents, decoder.start((b, h, w)))
        project = tree.build(self.graphs["projectors"], params["projectors"])
        return frames.astype(jnp.float32), project(levels[: self.matched])

    def target(self, params: Params, latents: Array) -> tuple[Array, list[Array]]:
        """Returns the teacher's frames, fp32 and in [0, 1], and its features of the matched levels."""
        teacher = tree.build(self.graphs["teacher"], params)
        frames, levels = teacher.features(latents / self.teacher.vae.scaling_factor)
        return jnp.clip(frames.astype(jnp.float32) / 2 + 0.5, 0, 1), levels[: self.matched]

    def judge(self, params: Params) -> Callable[[Array], Array]:
        """Returns the critic, from frames in [0, 1] to fp32 logits."""
        critic = tree.build(self.graphs["critic"], params)
        return lambda frames: critic(2 * frames - 1).astype(jnp.float32)


def student(vae: VAEConfig, config) -> TinyDecoderConfig:
    """Returns the decoder of `config.decoder` for the latents of `vae`.

    Raises:
      UserError: if its levels do not fit each other or the VAE.
    """
    own = config.decoder
    made = VARIANTS[own.variant](vae.latent_channels, vae.downscale)
    given: dict[str, Any] = {name: tuple(own[name]) for name in ("block_out_channels", "layers_per_block") if own[name]}
    made = replace(made, out_channels=vae.out_channels, **given)
    if made.downscale != vae.downscale:
        levels = vae.downscale.bit_length()
        raise UserError(
            f"decoder.block_out_channels={made.block_out_channels}: the VAE makes {vae.downscale} pixels of a latent "
            f"cell, which takes {levels} levels"
        )
    return made


def make_networks(teacher: Teacher, config) -> DecoderNetworks:
    """Returns the networks of the distillation.

    Raises:
      UserError: if the student does not fit the VAE, or `config.trainable` finds no parameter.
    """
    networks = DecoderNetworks(student(teacher.vae, config), teacher, config.dtype)
    optim.check_trainable(networks.abstract["generator"], config.trainable)
    return networks


def fresh(networks: DecoderNetworks, config) -> Params:
    """Returns random parameters of the student, whose frames are gray at first."""
    params = tree.init(TinyTemporalDecoder, networks.config, config.seed)
    params["conv_out"]["bias"] += 0.5
    return params


def init_state(networks: DecoderNetworks, config, params: Params) -> tuple[Params, Params]:
    """Returns (state, frozen).

    Args:
      networks: networks of the distillation.
      config: config of the run.
      params: `decoder`, the student; `teacher`, the VAE's decoder; `unet` if some latents are generated.
    """
    keys = jax.random.split(stream(config.seed, "decoder"))
    projectors = tree.init(Projectors, networks.projectors, keys[0])
    state = generator_state(config, params["decoder"] | {"projectors": projectors})
    if config.decoder.adv_weight:
        critic = tree.init(PatchCritic, networks.critic, keys[1])
        state |= {"critic": critic, "opt_d": optim.make_optimizer(config.generator_optimizer).init(critic)}
    return state, frozen_copy(config, {name: params[name] for name in ("teacher", "unet") if name in params})


def cropped(key: Array, latents: Array, frames: Array | None, size: int) -> tuple[Array, Array | None]:
    """Returns a random square of `size` cells of each sample, the same in all frames; of the frames, its pixels.

    A side that is not longer remains whole, and so does everything if `size` is 0.
    """
    h, w = latents.shape[2:4]
    sides = (min(size or h, h), min(size or w, w))
    if sides == (h, w):
        return latents, frames
    keys = jax.random.split(key)
    corners = [
        jax.random.randint(k, (len(latents),), 0, n - side + 1) for k, n, side in zip(keys, (h, w), sides, strict=True)
    ]

    def cut(x: Array) -> Array:
        scale = x.shape[2] // h
        shape = (x.shape[1], scale * sides[0], scale * sides[1], x.shape[-1])
        one = lambda x, i, j: jax.lax.dynamic_slice(x, (0, scale * i, scale * j, 0), shape)  # noqa: E731
        return jax.vmap(one)(x, *corners)

    return cut(latents), None if frames is None else cut(frames)


def differences(frames: Array) -> Array:
    """Returns the differences `[b, t - 1, ...]` of consecutive frames; those of a single frame are one zero."""
    return jnp.diff(frames, axis=1) if frames.shape[1] > 1 else jnp.zeros_like(frames)


def reconstruction(made: Array, target: Array, features: list[Array], expected: list[Array]) -> dict[str, Array]:
    """Returns the losses of frames `[b, t, h, w, 3]` in [0, 1] and of features, each a mean over all elements.

    `l1` is the distance of the frames; `flicker` that of their differences, without which each frame may be near its
    target while the error jumps from frame to frame; `features` the mean over levels of the squared error as a share of
    the teacher's mean square, so that no level outweighs the others.
    """
    shares = [
        jnp.mean(jnp.square(x.astype(jnp.float32) - y)) / (jnp.mean(jnp.square(y)) + 1e-8)
        for x, y in zip(features, (y.astype(jnp.float32) for y in expected), strict=True)
    ]
    return {
        "l1": jnp.mean(jnp.abs(made - target)),
        "flicker": jnp.mean(jnp.abs(differences(made) - differences(target))),
        "features": sum(shares, jnp.zeros(())) / len(shares),
    }


def make_train_step(networks: DecoderNetworks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`: pure, with the randomness of `step_key`.

    `batch` contains `latents [n, t, h, w, c]` (scaled) and optionally `frames` uint8 `[n, t, H, W, 3]`, the real ones;
    with generated latents also their conditions `cond_latent`, `image_embed` and `ids`.
    """
    own = config.decoder
    weights = {
        "l1": own.l1_weight,
        "flicker": own.flicker_weight,
        "features": own.feature_weight,
        "real_l1": own.real_weight,
        "adversarial": own.adv_weight,
    }
    unet = Networks(networks.teacher.unet, dtype=config.dtype) if networks.teacher.unet else None

    def generated(frozen: Params, batch: dict, key: Array, count: int) -> Array:
        """Returns latents that the UNet makes in one step under the conditions of the first `count` samples."""
        assert unet is not None
        condition = {k: batch[k][:count] for k in ("cond_latent", "image_embed", "ids")}
        noise = jax.random.normal(key, batch["latents"][:count].shape)
        sigma = jnp.full(count, edm.SIGMA_MAX)
        made = edm.denoise(unet.generator(frozen["unet"]), edm.SIGMA_MAX * noise, sigma, condition)
        return jax.lax.stop_gradient(made)

    def gradients(params, batch, key):
        generator, critic, frozen = params
        k_noise, k_crop = jax.random.split(key)
        latents, real = batch["latents"], batch.get("frames")
        count = int(own.generated_share * len(latents)) if unet else 0
        if count:
            latents = jnp.concatenate([generated(frozen, batch, k_noise, count), latents[count:]])
        latents, real = cropped(k_crop, latents, real, own.crop)
        target, expected = networks.target(frozen["teacher"], latents)

        def loss(part):
            made, features = networks.decode(tree.merge(generator, part), latents)
            terms = reconstruction(made, target, features, expected)
            if own.real_weight:
                assert real is not None
                terms["real_l1"] = jnp.mean(jnp.abs(made[count:] - real[count:].astype(jnp.float32) / 255))
            if own.adv_weight:
                judge = networks.judge(critic)
                terms["adversarial"] = losses.relativistic_generator([judge(target)], [judge(made)])
            return sum(weights[name] * value for name, value in terms.items()), (terms, made)

        part = optim.trainable(generator, config.trainable)
        grads, (terms, made) = jax.grad(loss, has_aux=True)(part)
        metrics = {f"loss/{name}": value for name, value in terms.items()}
        metrics["quality/psnr"] = -10 * jnp.log10(jnp.mean(jnp.square(jnp.clip(made, 0, 1) - target)) + 1e-10)
        metrics["motion/fake"] = jnp.mean(jnp.square(differences(made)))
        metrics["motion/real"] = jnp.mean(jnp.square(differences(target)))
        critic_grads = {}
        if own.adv_weight:
            critic_grads, more = critic_gradients(critic, target, jax.lax.stop_gradient(made))
            metrics |= more
        return (grads, critic_grads), metrics

    def critic_gradients(critic: Params, real: Array, fake: Array):
        """Relativistic pairs with a gradient penalty on the real frames (R3GAN, arXiv 2501.05441)."""

        def loss(critic):
            judge = networks.judge(critic)
            value = losses.relativistic_discriminator([judge(real)], [judge(fake)])
            slope = jax.grad(lambda frames: jnp.sum(judge(frames)))(real)
            penalty = jnp.mean(jnp.sum(jnp.square(slope), axis=(1, 2, 3, 4)))
            return value + own.r1_weight / 2 * penalty, {"loss/critic": value, "loss/r1": penalty}

        return jax.grad(loss, has_aux=True)(critic)

    def train_step(state, frozen, batch):
        step = state["step"]
        params = (state["generator"], state.get("critic", {}), frozen)
        (grads, critic_grads), metrics = accumulate(
            gradients, params, batch, step_key(config, step), config.accumulation_steps
        )
        new, norms = update_generator(config, state, grads, warmed_decay(config, step))
        if own.adv_weight:
            optimizer = optim.make_optimizer(config.generator_optimizer)
            new["critic"], new["opt_d"], _ = optim.apply(optimizer, critic_grads, state["opt_d"], state["critic"])
        seen = {"latents": batch["latents"]}
        metrics |= norms | watch(batch=seen, generator_gradient=grads, generator=new["generator"])
        return {"step": step + 1, **new}, metrics

    return train_step

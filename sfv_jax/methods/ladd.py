"""LADD (arXiv 2403.12015) on SVD: adversarial distillation without reconstruction, mostly at the highest noise level.

State and frozen networks are those of `adversarial`; with `ladd.teacher_steps`, `teacher` is frozen too.
"""

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm
from sfv_jax.diffusion.solvers import guidance_ramp, sample
from sfv_jax.errors import UserError
from sfv_jax.methods import adversarial, sfv
from sfv_jax.methods.common import frozen_copy
from sfv_jax.models.networks import Networks, Params


def make_networks(unet, config) -> Networks:
    """As `adversarial.make_networks`.

    Raises:
      UserError: also for levels and probabilities that do not belong together, or impossible guidance.
    """
    method = config.ladd
    for name in ("probabilities", "warmup_probabilities"):
        p = method[name]
        if len(p) != len(method.probabilities) or min(p) < 0 or abs(sum(p) - 1) > 1e-6:
            raise UserError(f"ladd.{name}={p}: one probability for each level, 1 together")
    if len(method.probabilities) > method.generator_levels:
        raise UserError(
            f"ladd.generator_levels={method.generator_levels}: fewer than the {len(method.probabilities)} probabilities"
        )
    if method.teacher_steps < 0:
        raise UserError(f"ladd.teacher_steps={method.teacher_steps}: 0 for real videos, or a number of steps")
    guidance_ramp(method.teacher_guidance, unet.num_frames)
    return adversarial.make_networks(unet, config)


def init_state(networks: Networks, config, generator: Params) -> tuple[Params, Params]:
    """As `adversarial.init_state`; the base model is kept, frozen, where it makes the training videos."""
    state, frozen = adversarial.init_state(networks, config, generator)
    return state, frozen | ({"teacher": frozen_copy(config, generator)} if config.ladd.teacher_steps else {})


def make_gradients(networks: Networks, config):
    """As `adversarial.make_gradients`: levels by probability, after a warm-up at the lower ones; no second loss."""
    method = config.ladd
    g_sigmas = edm.karras_sigmas(method.generator_levels)[-len(method.probabilities) :]

    def probabilities(step):
        warm = jnp.asarray(step) < method.warmup_steps
        return jnp.where(warm, jnp.array(method.warmup_probabilities), jnp.array(method.probabilities))

    def distance(x, x0, sigma):
        del sigma
        return jnp.mean(jnp.square(x - x0))  # watched, and without weight: LADD has no reconstruction

    learn = adversarial.make_gradients(networks, config, sfv.make_draw(method, g_sigmas, probabilities), distance)

    def gradients(generator, heads, frozen, batch, key, step=0):
        if method.teacher_steps:
            latents = teacher_videos(networks.generator(frozen["teacher"]), batch, jax.random.fold_in(key, 3), method)
            batch = batch | {"latents": latents}
        return learn(generator, heads, frozen, batch, key, step)

    return gradients


def teacher_videos(teacher, batch, key, method) -> jax.Array:
    """Latents `[b, t, h, w, c]` that the base model makes from the conditions of a batch, in guided Euler steps."""
    shape = batch["latents"].shape
    ramp = guidance_ramp(method.teacher_guidance, shape[1])
    condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
    return sample(teacher, jax.random.normal(key, shape), condition, edm.sampling_sigmas(method.teacher_steps), ramp)


def make_train_step(networks: Networks, config):
    """As `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

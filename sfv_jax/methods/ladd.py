"""LADD (arXiv 2403.12015) on SVD: adversarial distillation without reconstruction, mostly at the highest noise level.

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`, and with `ladd.teacher_steps` also
`teacher`.
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
    """Returns generator, backbone and heads for a config.

    Raises:
      UserError: if levels and probabilities do not fit together, guidance is impossible, or settings do not exist or
        contradict each other.
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
    """Returns (state, frozen) from the base model's UNet parameters; with `teacher_steps`, `frozen` has the teacher."""
    state, frozen = adversarial.init_state(networks, config, generator)
    return state, frozen | ({"teacher": frozen_copy(config, generator)} if config.ladd.teacher_steps else {})


def make_gradients(networks: Networks, config):
    """Returns the gradient function of one micro-batch, see `adversarial.make_gradients`.

    Levels are drawn by probability, after a warm-up at the lower ones. The second loss has no weight.
    """
    method = config.ladd
    g_sigmas = edm.karras_sigmas(method.generator_levels)[-len(method.probabilities) :]

    def probabilities(step):
        warm = jnp.asarray(step) < method.warmup_steps
        return jnp.where(warm, jnp.array(method.warmup_probabilities), jnp.array(method.probabilities))

    def distance(x, x0, sigma):
        del sigma
        return jnp.mean(jnp.square(x - x0))  # a metric only: LADD has no reconstruction loss

    learn = adversarial.make_gradients(networks, config, sfv.make_draw(method, g_sigmas, probabilities), distance)

    def gradients(generator, heads, frozen, batch, key, step=0):
        if method.teacher_steps:
            latents = teacher_videos(networks.generator(frozen["teacher"]), batch, jax.random.fold_in(key, 3), method)
            batch = batch | {"latents": latents}
        return learn(generator, heads, frozen, batch, key, step)

    return gradients


def teacher_videos(teacher, batch, key, method) -> jax.Array:
    """Samples latents `[b, t, h, w, c]` from the base model under the conditions of a batch, in guided Euler steps."""
    shape = batch["latents"].shape
    ramp = guidance_ramp(method.teacher_guidance, shape[1])
    condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
    return sample(teacher, jax.random.normal(key, shape), condition, edm.sampling_sigmas(method.teacher_steps), ramp)


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`, see `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

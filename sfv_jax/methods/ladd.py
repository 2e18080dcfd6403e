"""LADD (arXiv 2403.12015) on SVD: adversarial distillation without reconstruction, mostly at the highest noise level.

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`, and with `ladd.teacher_steps` also
`teacher`.
"""

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm
from sfv_jax.diffusion.solvers import guidance_ramp, sample
from sfv_jax.methods import adversarial, sfv
from sfv_jax.methods.common import frozen_copy
from sfv_jax.models.networks import Networks, Params

make_networks = adversarial.make_networks


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

    def videos(frozen, batch, key):
        return teacher_videos(networks.generator(frozen["teacher"]), batch, key, method)

    draw = sfv.make_draw(method, g_sigmas, probabilities)
    return adversarial.make_gradients(networks, config, draw, distance, videos if method.teacher_steps else None)


def teacher_videos(teacher, batch, key, method) -> jax.Array:
    """Samples latents `[b, t, h, w, c]` from the base model under the conditions of a batch, in guided Euler steps."""
    shape = batch["latents"].shape
    ramp = guidance_ramp(method.teacher_guidance, shape[1])
    condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
    return sample(teacher, jax.random.normal(key, shape), condition, edm.sampling_sigmas(method.teacher_steps), ramp)


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`, see `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

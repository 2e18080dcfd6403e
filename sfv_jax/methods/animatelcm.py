"""AnimateLCM (arXiv 2402.00769) on SVD: consistency distillation with a guided teacher and an averaged target.

In this module only, levels are counted DOWNWARDS: i = 0 is sigma 700, i = N - 1 is 0.002, so i + 1 has less noise. The
student predicts x0 at level i. The frozen base model makes one guided Euler step from there to level i + 1, where the
moving average of the student predicts x0 too; its prediction is the target, without gradient. At 0.002 the
preconditioning is the identity, so no boundary condition has to be forced.

State: `step`, `generator`, `ema` (the target network), `opt_g`. Frozen: `teacher`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.diffusion import edm, losses
from sfv_jax.diffusion.solvers import guided
from sfv_jax.methods import optim
from sfv_jax.methods.common import (
    accumulate,
    check_recipe,
    frozen_copy,
    generator_state,
    step_key,
    update_generator,
    watch,
)
from sfv_jax.models import tree
from sfv_jax.models.networks import Networks, Params
from sfv_jax.models.unet import UNetConfig

Array = jax.Array


def make_networks(unet: UNetConfig, config) -> Networks:
    """Returns the UNet alone: student, target and teacher have the same architecture.

    Raises:
      UserError: if the recipe is impossible (`check_recipe`).
    """
    return check_recipe(config, Networks(unet, None, config.dtype))


def init_state(networks: Networks, config, generator: Params) -> tuple[Params, Params]:
    """Returns (state, frozen) from the base model's UNet parameters, with which all three networks start."""
    del networks
    return generator_state(config, generator), {"teacher": frozen_copy(config, generator)}


def draw_ramps(key: Array, first, last, shape: tuple[int, int]) -> Array:
    """Returns guidance weights `[b, t]`: per video, a straight line between ends drawn from `first` and `last`.

    Args:
      key: random key.
      first: candidates for the weight of the first frame.
      last: candidates for the weight of the last frame.
      shape: (b, t).
    """
    k_first, k_last = jax.random.split(key)
    a = jax.random.choice(k_first, jnp.asarray(first), shape[:1])[:, None]
    b = jax.random.choice(k_last, jnp.asarray(last), shape[:1])[:, None]
    return a + jnp.linspace(0, 1, shape[1]) * (b - a)


def make_gradients(networks: Networks, config) -> Callable:
    """Returns the gradient function of one micro-batch.

    It is `(generator, target, frozen, batch, key) -> (gradients of the trained part, metrics)`.
    """
    method = config.animatelcm
    sigmas = jnp.asarray(np.ascontiguousarray(edm.karras_sigmas(method.levels)[::-1]))

    def gradients(generator, target, frozen, batch, key):
        x0 = batch["latents"]
        k_level, k_noise, k_ramp = jax.random.split(key, 3)
        i = jax.random.randint(k_level, x0.shape[:1], 0, method.levels - 1)
        high, low = sigmas[i], sigmas[i + 1]
        x = edm.add_noise(x0, jax.random.normal(k_noise, x0.shape), high)
        ramps = draw_ramps(k_ramp, method.guidance_first, method.guidance_last, x0.shape[:2])
        condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
        guess = guided(networks.generator(frozen["teacher"]), x, high, condition, ramps)
        lower = x + edm.expand(low - high, x) * (x - guess) / edm.expand(high, x)  # Eq. 4 of SF-V
        goal = edm.denoise(networks.generator(target), lower, low, batch)
        weight = (1 / (high - low)) ** method.weight_power

        def loss(part):
            found = edm.denoise(networks.generator(tree.merge(generator, part)), x, high, batch)
            return losses.consistency(found, goal, weight, method.huber_c)

        value, grads = jax.value_and_grad(loss)(optim.trainable(generator, config.trainable))
        return grads, {"loss/consistency": value}

    return gradients


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`: pure, with the randomness of `step_key`.

    `batch` contains `latents [n, t, h, w, c]` (scaled), `cond_latent [n, h, w, c]` (unscaled), `image_embed [n, d]` and
    `ids [n, 3]`.
    """
    gradients = make_gradients(networks, config)

    def train_step(state, frozen, batch):
        step, generator, target = state["step"], state["generator"], state["ema"]
        key = step_key(config, step)
        grads, metrics = accumulate(
            lambda params, micro, k: gradients(*params, micro, k),
            (generator, target, frozen),
            batch,
            key,
            config.accumulation_steps,
        )
        new, norms = update_generator(config, state, grads, config.ema_decay)
        metrics |= norms | watch(batch=batch, generator_gradient=grads, generator=new["generator"])
        return {"step": step + 1, **new}, metrics

    return train_step

"""EDM denoising: trains or fine-tunes the base model (the multi-step teacher SF-V starts from).

State: `step`, `generator`, `ema`, `opt_g`. Nothing is frozen.
"""

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import optim
from sfv_jax.methods.common import (
    accumulate,
    check_recipe,
    generator_state,
    step_key,
    update_generator,
    warmed_decay,
    watch,
)
from sfv_jax.models import tree
from sfv_jax.models.networks import Networks, Params
from sfv_jax.models.unet import UNetConfig

Array = jax.Array


def make_networks(unet: UNetConfig, config) -> Networks:
    """Returns the UNet alone.

    Raises:
      UserError: if the recipe is impossible (`check_recipe`).
    """
    return check_recipe(config, Networks(unet, None, config.dtype))


def init_state(networks: Networks, config, generator: Params) -> tuple[Params, Params]:
    """Returns (state, frozen) from initial UNet parameters; `frozen` is empty."""
    del networks
    return generator_state(config, generator), {}


def drop_conditions(batch: dict, key: Array, p: float) -> dict:
    """Drops conditions for classifier-free guidance: per sample, zeroes the image embedding, the latent, or both.

    With u uniform in [0, 1), the embedding is dropped if u < 2p and the latent if p <= u < 3p (InstructPix2Pix, arXiv
    2211.09800).
    """
    u = jax.random.uniform(key, (len(batch["latents"]),))
    embed = batch["image_embed"] * (u >= 2 * p)[:, None]
    latent = batch["cond_latent"] * ((u < p) | (u >= 3 * p))[:, None, None, None]
    return batch | {"image_embed": embed, "cond_latent": latent}


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`: pure, with the randomness of `step_key`.

    ln sigma ~ N(p_mean, p_std^2); the loss is the unweighted squared error of the raw output (SVD appendix D). `batch`
    contains `latents [n, t, h, w, c]` (scaled), `cond_latent [n, h, w, c]` (unscaled), `image_embed [n, d]` and
    `ids [n, 3]`.
    """
    method = config.teacher

    def gradients(generator, batch, key):
        k_sigma, k_noise, k_drop = jax.random.split(key, 3)
        batch = drop_conditions(batch, k_drop, method.cond_drop) if method.cond_drop else batch
        x0 = batch["latents"]
        sigma = jnp.minimum(edm.draw_lognormal(k_sigma, method.p_mean, method.p_std, (len(x0),)), edm.SIGMA_MAX)
        noise = jax.random.normal(k_noise, x0.shape)
        x = edm.model_input(edm.add_noise(x0, noise, sigma), batch["cond_latent"], sigma)

        def loss(part):
            network = networks.generator(tree.merge(generator, part))
            raw = network(x, edm.scalings(sigma)[3], batch["image_embed"], batch["ids"])
            return losses.edm(raw, edm.velocity_target(x0, noise, sigma))

        value, grads = jax.value_and_grad(loss)(optim.trainable(generator, config.trainable))
        return grads, {"loss/denoising": value}

    def train_step(state, frozen, batch):
        del frozen
        step, generator = state["step"], state["generator"]
        key = step_key(config, step)
        grads, metrics = accumulate(gradients, generator, batch, key, config.accumulation_steps)
        new, norms = update_generator(config, state, grads, warmed_decay(config, step))
        metrics |= norms | watch(batch=batch, generator_gradient=grads, generator=new["generator"])
        return {"step": step + 1, **new}, metrics

    return train_step

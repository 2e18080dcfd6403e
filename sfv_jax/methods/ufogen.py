"""UFOGen (arXiv 2311.09257) on SVD: adversarial denoising over all noise levels, with the ordinary denoising loss.

The generator predicts x0 from level t. Its prediction is noised AGAIN, by the forward process with fresh noise, to a
level a quarter of the range lower, where it must resemble real latents noised to that level. (Diffusion GANs step down
by the posterior of x_t instead.)

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`.
"""

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.errors import UserError
from sfv_jax.methods import adversarial
from sfv_jax.models.networks import Networks

init_state = adversarial.init_state


def make_networks(unet, config) -> Networks:
    """Returns generator, backbone and heads for a config.

    Raises:
      UserError: if the jump is not a share of the levels, or settings do not exist or contradict each other.
    """
    if not 0 <= config.ufogen.jump <= 1:
        raise UserError(f"ufogen.jump={config.ufogen.jump}: a share of all levels, 0 to 1")
    return adversarial.make_networks(unet, config)


def make_gradients(networks: Networks, config):
    """Returns the gradient function of one micro-batch, see `adversarial.make_gradients`.

    The generator's levels are uniform; the discriminator's is a fixed number of levels below it.
    """
    method = config.ufogen
    sigmas = jnp.asarray(edm.karras_sigmas(method.levels))
    jump = round(method.jump * method.levels)

    def draw(key, shape, step):
        del step
        k_level, k_noise, k_real, k_fake = jax.random.split(key, 4)
        t = jax.random.randint(k_level, shape[:1], 1, method.levels)  # level 0, the lowest, leaves nothing to denoise
        lower = sigmas[jnp.maximum(t - jump, 0)]
        real, fake = (jax.random.normal(k, shape) for k in (k_real, k_real if method.shared_noise else k_fake))
        one_step = t >= method.levels - method.levels // 20  # sigma above 500 or so: too few draws are at the very top
        return adversarial.Draws((sigmas[t], jax.random.normal(k_noise, shape)), (lower, real), (lower, fake), one_step)

    return adversarial.make_gradients(networks, config, draw, losses.denoising)


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`, see `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

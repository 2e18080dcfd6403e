"""UFOGen (arXiv 2311.09257) on SVD: adversarial denoising over all noise levels, with the ordinary denoising loss.

The generator predicts x0 from level t. Its prediction is noised AGAIN, by the forward process with fresh noise, to a
level a quarter of the range lower, where it must resemble real latents noised to that level. (Diffusion GANs step down
by the posterior of x_t instead.)

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`.
"""

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import adversarial
from sfv_jax.models.networks import Networks

make_networks = adversarial.make_networks
init_state = adversarial.init_state


def make_gradients(networks: Networks, config):
    """Returns the gradient function of one micro-batch, see `adversarial.make_gradients`.

    The generator's levels are uniform; the discriminator's is a fixed number of levels below it.
    """
    method = config.ufogen
    sigmas = jnp.asarray(edm.karras_sigmas(method.levels))
    jump = round(method.jump * method.levels)

    def draw(keys, shape, step):
        del step
        # Level 0, the lowest, leaves nothing to denoise.
        t = jax.random.randint(keys.level, shape[:1], 1, method.levels)
        lower, noise = sigmas[jnp.maximum(t - jump, 0)], jax.random.normal(keys.noise, shape)
        real = jax.random.normal(keys.real_noise, shape)
        fake = real if method.shared_noise else jax.random.normal(keys.fake_noise, shape)
        one_step = t >= method.levels - method.levels // 20  # sigma above 500 or so: too few draws are at the very top
        return adversarial.Draws((sigmas[t], noise), (lower, real), (lower, fake), one_step)

    return adversarial.make_gradients(networks, config, draw, losses.denoising)


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`, see `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

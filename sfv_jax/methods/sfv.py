"""SF-V (arXiv 2406.04324): adversarial fine-tuning of SVD into a one-step image-to-video generator.

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`.
"""

import math

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import adversarial
from sfv_jax.models.networks import Networks

make_networks = adversarial.make_networks
init_state = adversarial.init_state


# Numbers in the latent of a video of the paper: 14 frames of 448x768 pixels, 8x8 pixels and 4 channels per cell.
FULL_SIZE = 14 * 56 * 96 * 4


def noise_shift(size: int) -> float:
    """Returns what to add to P_mean of a video of `FULL_SIZE` numbers for one of `size` numbers.

    A deviation that all numbers of a video share is as easy to find under noise of sigma as the number's square root
    is large: sqrt(d) / sigma decides, so sigma scales with sqrt(d). Shifts of timesteps with resolution rest on the
    same argument (arXiv 2403.03206, section 5.3.2).
    """
    return 0.5 * math.log(size / FULL_SIZE)


def make_draw(method, g_sigmas, probabilities):
    """Returns the `draw` of `adversarial.make_gradients`: few generator levels, many discriminator levels (Eq. 7).

    Args:
      method: config section with the discriminator's levels.
      g_sigmas: `[n]` levels of the generator, increasing.
      probabilities: `step -> [n]` probabilities of these levels; None for uniform.

    Returns:
      `(adversarial.Keys, shape of the latents, step) -> adversarial.Draws`.
    """

    def draw(keys, shape, step):
        p_mean = method.p_mean + (noise_shift(math.prod(shape[1:])) if method.noise_shift else 0)
        d_sigmas, d_probabilities = edm.lognormal_levels(method.discriminator_levels, p_mean, method.p_std)

        def renoise(level, noise, shape):
            return edm.draw_levels(level, d_sigmas, d_probabilities, shape[:1]), jax.random.normal(noise, shape)

        sigma = edm.draw_levels(keys.level, g_sigmas, probabilities and probabilities(step), shape[:1])
        real = renoise(keys.real_level, keys.real_noise, shape)
        fake = real if method.shared_noise else renoise(keys.fake_level, keys.fake_noise, shape)
        return adversarial.Draws((sigma, jax.random.normal(keys.noise, shape)), real, fake, sigma >= g_sigmas[-1])

    return draw


def make_gradients(networks: Networks, config):
    """Returns the gradient function of one micro-batch, see `adversarial.make_gradients`.

    The generator's levels are uniform (section 3.2), or drawn with `probabilities`; the second loss is pseudo-Huber
    (Eq. 9).
    """
    method = config.sfv

    def reconstruction(x, x0, sigma):
        del sigma
        return losses.pseudo_huber(x, x0, method.recon_c, method.recon_reduction)

    probabilities = (lambda step: jnp.array(method.probabilities)) if method.probabilities else None
    draw = make_draw(method, edm.generator_sigmas(method.generator_levels), probabilities)
    return adversarial.make_gradients(networks, config, draw, reconstruction)


def make_train_step(networks: Networks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`, see `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

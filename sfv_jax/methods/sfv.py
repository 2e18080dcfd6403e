"""SF-V (arXiv 2406.04324): adversarial fine-tuning of SVD into a one-step image-to-video generator.

State and frozen networks are those of `adversarial`.
"""

import jax

from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import adversarial
from sfv_jax.models.networks import Networks

make_networks = adversarial.make_networks
init_state = adversarial.init_state


def make_draw(method, g_sigmas, probabilities):
    """`draw` of `adversarial.make_gradients`: few levels of the generator, many of the discriminator (Eq. 7).

    Args:
      method: config section, for the discriminator's levels.
      g_sigmas: `[n]` levels of the generator, increasing.
      probabilities: `step -> [n]`, of these levels; or None, all alike.
    """
    d_sigmas, d_probabilities = edm.lognormal_levels(method.discriminator_levels, method.p_mean, method.p_std)

    def draw(key, shape, step):
        b = shape[:1]
        k_level, k_noise, *k_real = jax.random.split(key, 4)
        k_fake = k_real if method.shared_noise else jax.random.split(jax.random.fold_in(key, 1))
        sigma = edm.draw_levels(k_level, g_sigmas, probabilities and probabilities(step), b)
        real, fake = (
            (edm.draw_levels(k[0], d_sigmas, d_probabilities, b), jax.random.normal(k[1], shape))
            for k in (k_real, k_fake)
        )
        return adversarial.Draws((sigma, jax.random.normal(k_noise, shape)), real, fake, sigma >= g_sigmas[-1])

    return draw


def make_gradients(networks: Networks, config):
    """As `adversarial.make_gradients`: uniform levels of the generator (section 3.2), pseudo-Huber loss (Eq. 9)."""
    method = config.sfv

    def reconstruction(x, x0, sigma):
        del sigma
        return losses.pseudo_huber(x, x0, method.recon_c, method.recon_reduction)

    draw = make_draw(method, edm.generator_sigmas(method.generator_levels), None)
    return adversarial.make_gradients(networks, config, draw, reconstruction)


def make_train_step(networks: Networks, config):
    """As `adversarial.make_train_step`."""
    return adversarial.make_train_step(config, make_gradients(networks, config))

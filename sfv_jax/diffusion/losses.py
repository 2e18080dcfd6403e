"""Losses of SF-V (arXiv 2406.04324). Scores follow the paper's sign: real towards <= -1, fake towards >= +1.

Hinge terms are taken per position of every logit map and averaged afterwards: averaging logits first lets one confident
position silence all others. Logits are `[b, t, h, w]` per head; every loss is an fp32 scalar.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sfv_jax.errors import UserError

Array = jax.Array


def _mean_over_heads(maps: list[Array]) -> Array:
    return jnp.mean(jnp.stack([jnp.mean(x) for x in maps]))


def hinge_discriminator(real: list[Array], fake: list[Array]) -> Array:
    """Hinge terms of Eq. 11: E max(0, 1 + D(x')) + E max(0, 1 - D(x_hat')), mean over positions, then over heads."""
    return _mean_over_heads([jax.nn.relu(1 + x) for x in real]) + _mean_over_heads([jax.nn.relu(1 - x) for x in fake])


def adversarial_generator(fake: list[Array]) -> Array:
    """Eq. 8: E D(x_hat'); minimizing it moves fakes to where real samples are pushed."""
    return _mean_over_heads(fake)


def relativistic_discriminator(real: list[Array], fake: list[Array]) -> Array:
    """E softplus(D(x') - D(x_hat')), position by position: each fake is scored against its own real video.

    R3GAN (arXiv 2501.05441), with its sign turned to ours. Real and fake must share noise level and noise.
    """
    return _mean_over_heads([jax.nn.softplus(r - f) for r, f in zip(real, fake, strict=True)])


def relativistic_generator(real: list[Array], fake: list[Array]) -> Array:
    """E softplus(D(x_hat') - D(x')): the discriminator's loss with the two exchanged."""
    return relativistic_discriminator(fake, real)


def live_share(real: Array, fake: Array, kind: str) -> Array:
    """Fraction of the head's loss gradient still active; 0 means perfect separation.

    For "hinge", the share of terms that are not zero; for "relativistic", the mean of sigmoid(D(x') - D(x_hat')).
    """
    if kind == "relativistic":
        return jnp.mean(jax.nn.sigmoid(real - fake))
    return (jnp.mean(real > -1) + jnp.mean(fake < 1)) / 2


def perturbation_penalty(logits: list[Array], perturbed: list[Array]) -> Array:
    """R1 (or R2) without second derivatives: E (D(x) - D(x + s e))^2, mean over positions, then over heads.

    APT (arXiv 2501.08316); divided by s^2 it tends to the squared directional derivative of D along e.
    """
    return _mean_over_heads([jnp.square(a - b) for a, b in zip(logits, perturbed, strict=True)])


def r1_on_features(heads: Callable, features: list[Array]) -> Array:
    """R1 of Eq. 11 on the heads' inputs: E ||d sum(logits) / d features||^2 on real samples, mean over heads and batch.

    The gradient stops at the features, as in ADD (arXiv 2311.17042): second derivatives never reach the backbone.

    Args:
      heads: `features -> logits`, head n reading `features[n]` alone and treating samples independently, so that the
        gradient of all logits together contains each head's own gradient.
      features: one array `[b, t, h, w, c]` per head, repeated for heads on the same features.
    """
    logits, pullback = jax.vjp(heads, features)
    (gradients,) = pullback([jnp.ones_like(x) for x in logits])
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) / len(g) for g in gradients]
    return jnp.mean(jnp.stack(squares))


def pseudo_huber(x: Array, target: Array, c: float | None = None, reduction: str = "video") -> Array:
    """Eq. 9: sqrt(||x - target||^2 + c^2) - c of `[b, t, h, w, c]`, mean over the batch.

    Args:
      c: default 0.00054 sqrt(d), d the number of elements under the norm (improved consistency training); for "rms"
        0.00054, because that norm is divided by sqrt(d).
      reduction: "video" takes the norm over the whole latent of a video, as printed; its gradient with respect to the
        video has a norm of about 1 at any size. "rms" divides that norm by sqrt(d), d the number of elements of a
        video, so that its gradient scales with size as that of a loss that is a mean over positions. "element" takes
        the norm per element and averages, which is as small, and in which small and large errors weigh alike.

    Raises:
      UserError: if `reduction` is none of them.
    """
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    if reduction == "video":
        square = jnp.sum(jnp.square(x - target), axis=tuple(range(1, x.ndim)))
        d = math.prod(x.shape[1:])
    elif reduction == "rms":
        square, d = jnp.mean(jnp.square(x - target), axis=tuple(range(1, x.ndim))), 1
    elif reduction == "element":
        square, d = jnp.square(x - target), 1
    else:
        raise UserError(f"reduction {reduction!r}: choose 'video', 'rms' or 'element'")
    c = 0.00054 * math.sqrt(d) if c is None else c
    return jnp.mean(jnp.sqrt(square + c**2) - c)


def edm(raw: Array, target: Array) -> Array:
    """Denoising loss: mean squared error of the raw output against `edm.velocity_target`."""
    return jnp.mean(jnp.square(raw.astype(jnp.float32) - target))


def denoising(x: Array, x0: Array, sigma: Array) -> Array:
    """The loss of `edm` written on denoised latents `x [b, t, h, w, c]`: mean of (sigma^2 + 1) / sigma^2 (x - x0)^2.

    `sigma [b]`.
    """
    sigma = jnp.reshape(sigma, (-1,) + (1,) * (x.ndim - 1))
    return jnp.mean((sigma**2 + 1) / sigma**2 * jnp.square(x.astype(jnp.float32) - x0))


def consistency(x: Array, target: Array, weight: Array, c: float) -> Array:
    """AnimateLCM: mean of w (sqrt(e^2 + c^2) - c), e the difference of `x` and `target [b, t, h, w, c]`, `w [b]`."""
    error = x.astype(jnp.float32) - target
    return jnp.mean(jnp.reshape(weight, (-1,) + (1,) * (x.ndim - 1)) * (jnp.sqrt(jnp.square(error) + c**2) - c))

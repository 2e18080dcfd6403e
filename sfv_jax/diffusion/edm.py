"""Diffusion in SVD's (EDM) form: preconditioning, noise levels, noise. Equations are those of SF-V (arXiv 2406.04324).

Everything here is fp32. `sigma` is the noise level: x = x0 + sigma * eps, sigma_data = 1.
"""

from collections.abc import Callable
from math import erf, log, sqrt

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.errors import UserError

Array = jax.Array
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 700.0, 7.0


def karras_sigmas(n: int, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO) -> np.ndarray:
    """`[n]` float32 noise levels of Eq. 5, INCREASING with the index: s_0 = sigma_min, s_{n-1} = sigma_max.

    Raises:
      UserError: if n < 2 (the schedule has two fixed ends).
    """
    if n < 2:
        raise UserError(f"a noise schedule needs at least 2 levels, got {n}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return ((low + np.arange(n) / (n - 1) * (high - low)) ** rho).astype(np.float32)


def sampling_sigmas(steps: int, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO) -> np.ndarray:
    """`[steps + 1]` float32 levels of a sampler: sigma_max downwards, a final 0 (diffusers EulerDiscreteScheduler).

    One step goes from sigma_max straight to 0.

    Raises:
      UserError: if steps < 1.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    levels = karras_sigmas(steps, sigma_min, sigma_max, rho)[::-1] if steps > 1 else [sigma_max]
    return np.append(levels, 0.0).astype(np.float32)


def expand(sigma: Array, like: Array) -> Array:
    """`sigma [b]` with singleton axes up to the rank of `like [b, ...]`."""
    return jnp.reshape(sigma, sigma.shape + (1,) * (like.ndim - sigma.ndim))


def scalings(sigma: Array) -> tuple[Array, Array, Array, Array]:
    """c_skip, c_out, c_in, c_noise of Eq. 3 (v-prediction, sigma_data = 1), each of sigma's shape."""
    sigma = jnp.asarray(sigma, jnp.float32)
    norm = jnp.sqrt(sigma**2 + 1)
    return 1 / norm**2, -sigma / norm, 1 / norm, 0.25 * jnp.log(sigma)


def model_input(x: Array, cond_latent: Array, sigma: Array) -> Array:
    """UNet input `[b, t, h, w, 2c]`: c_in * x `[b, t, h, w, c]`, and the condition `[b, h, w, c]` on every frame."""
    scaled = expand(scalings(sigma)[2], x) * x
    return jnp.concatenate([scaled, jnp.broadcast_to(cond_latent[:, None], x.shape).astype(scaled.dtype)], axis=-1)


def denoised(raw: Array, x: Array, sigma: Array) -> Array:
    """D(x; sigma) of Eq. 2 from the network's raw output, fp32."""
    c_skip, c_out, _, _ = (expand(c, x) for c in scalings(sigma))
    return c_skip * x + c_out * raw.astype(jnp.float32)


def denoise(network: Callable, x: Array, sigma: Array, condition: dict) -> Array:
    """D(x; sigma, c) of Eq. 2: the predicted clean latents `[b, t, h, w, c]`, fp32.

    Args:
      network: `(input, c_noise, context, ids) -> raw`, a UNet.
      x: `[b, t, h, w, c]`, x0 + sigma * eps.
      sigma: `[b]`.
      condition: `cond_latent [b, h, w, c]`, `image_embed [b, d]`, `ids [b, 3]`.
    """
    raw = network(
        model_input(x, condition["cond_latent"], sigma), scalings(sigma)[3], condition["image_embed"], condition["ids"]
    )
    return denoised(raw, x, sigma)


def velocity_target(x0: Array, noise: Array, sigma: Array) -> Array:
    """v = (eps - sigma x0) / sqrt(sigma^2 + 1): the regression target of the raw output.

    Unweighted squared error against it is the EDM loss on the denoised sample with SVD's weight
    (sigma^2 + 1) / sigma^2.
    """
    sigma = expand(sigma, x0)
    return (noise - sigma * x0) / jnp.sqrt(sigma**2 + 1)


def add_noise(x0: Array, noise: Array, sigma: Array) -> Array:
    """x0 + sigma * noise, `sigma [b]`."""
    return x0 + expand(sigma, x0) * noise


def generator_sigmas(levels: int) -> np.ndarray:
    """`[levels - 1]` training levels {s_1 .. s_{Tg-1}} of the generator (section 3.2): 2.269, 70.54, 700 for Tg = 4."""
    return karras_sigmas(levels)[1:]


def few_step_sigmas(steps: int, levels: int = 4) -> np.ndarray:
    """`[steps + 1]` float32: the highest `steps` training levels of an SF-V generator, downwards, and a final 0.

    For the paper's Tg = `levels` = 4: 700, then 70.54, then 2.269.

    Raises:
      UserError: if steps < 1, or there are more steps than training levels.
    """
    if not 1 <= steps < levels:
        raise UserError(f"an SF-V generator of {levels} levels samples in 1 to {levels - 1} steps, got {steps}")
    return np.append(generator_sigmas(levels)[::-1][:steps], 0.0).astype(np.float32)


def consistency_sigmas(steps: int, levels: int = 40) -> np.ndarray:
    """`[steps + 1]` float32: every `levels // steps`-th of `levels` Karras levels, downwards, and a final 0.

    AnimateLCM's "StochasticIterative" schedule: sigma_min is never visited; 700, 128.6, 13.68, 0.4969 for 4 steps.

    Raises:
      UserError: if steps < 1, or there are more steps than levels.
    """
    if not 1 <= steps <= levels:
        raise UserError(f"AnimateLCM samples in 1 to {levels} steps, got {steps}")
    return np.append(karras_sigmas(levels)[::-1][:: levels // steps][:steps], 0.0).astype(np.float32)


def lognormal_levels(levels: int, p_mean: float, p_std: float) -> tuple[np.ndarray, np.ndarray]:
    """Discretized lognormal of Eq. 7 on the schedule of `levels` steps: (sigmas, probabilities), both `[levels - 2]`.

    p(s_i) ~ erf((ln s_{i+1} - P_mean) / (sqrt2 P_std)) - erf((ln s_i - P_mean) / (sqrt2 P_std)), i = 1 .. levels - 2
    (the last level has no s_{i+1}). Only the magnitude of P_std matters; the paper prints -1.

    Raises:
      UserError: if the law has no mass at these levels.
    """
    sigmas = karras_sigmas(levels)[1:]
    cdf = np.array([erf((log(s) - p_mean) / (sqrt(2) * abs(p_std))) for s in sigmas.astype(np.float64)])
    mass = np.diff(cdf)
    if not mass.sum() > 1e-6:  # NaN included
        raise UserError(f"{levels} levels have no mass under a lognormal law of p_mean={p_mean}, p_std={p_std}")
    return sigmas[:-1], (mass / mass.sum()).astype(np.float32)


def draw_levels(key: Array, sigmas: np.ndarray, probabilities: np.ndarray | None, shape: tuple[int, ...]) -> Array:
    """Independent draws of noise levels, `shape`, from `sigmas [n]` (uniform when `probabilities` is None)."""
    return jax.random.choice(key, jnp.asarray(sigmas), shape, p=probabilities)


def draw_lognormal(key: Array, p_mean: float, p_std: float, shape: tuple[int, ...]) -> Array:
    """sigma with ln sigma ~ N(p_mean, p_std^2), the continuous law of SVD's own training."""
    return jnp.exp(p_mean + p_std * jax.random.normal(key, shape))

"""Samplers as pure functions of a network: noise levels, Euler and consistency steps, classifier-free guidance."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.diffusion import edm
from sfv_jax.errors import UserError

Array = jax.Array


class Schedule(NamedTuple):
    """Noise schedule of a sampler.

    Attributes:
      sigmas: `steps -> [steps + 1]` noise levels, decreasing to 0.
      fresh: whether each step adds fresh noise.
    """

    sigmas: Callable[[int], np.ndarray]
    fresh: bool


SAMPLERS = {
    "euler": Schedule(edm.sampling_sigmas, fresh=False),  # SVD
    "sfv": Schedule(edm.few_step_sigmas, fresh=True),  # the training levels of an SF-V generator
    "sfv_euler": Schedule(edm.few_step_sigmas, fresh=False),
    "animatelcm": Schedule(edm.consistency_sigmas, fresh=True),
}


def sample(
    network: Callable,
    noise: Array,
    condition: dict,
    sigmas: Array | np.ndarray,
    guidance: Array | None = None,
    keys: Array | None = None,
) -> Array:
    """Samples scaled latents `[b, t, h, w, c]`, fp32, with one call of `network` per level in one `lax.scan`.

    A step predicts x0 and moves to the next level: x <- x0 + s_next eps. With eps = (x - x0) / s it is an Euler step on
    the probability-flow ODE (Eq. 4), with fresh noise a step of consistency sampling. The last level is 0, where both
    return x0; so a single step is Eq. 6.

    Args:
      network: `(input, c_noise, context, ids) -> raw`, a UNet.
      noise: `[b, t, h, w, c]` standard normal. The start is noise * sqrt(s_0^2 + 1), as in diffusers.
      condition: `cond_latent [b, h, w, c]`, `image_embed [b, d]`, `ids [b, 3]`.
      sigmas: `[n + 1]`, decreasing to 0.
      guidance: `[t]` weight of each frame, see `guided`; None for one network call per step.
      keys: `[b]` random keys of the fresh noise (`step_noise`); None for Euler steps.
    """

    sigmas = jnp.asarray(sigmas, jnp.float32)
    return walk(network, begin(noise, sigmas[0]), condition, sigmas, guidance, keys)


def begin(noise: Array, sigma: Array | float) -> Array:
    """Returns the start of sampling from `sigma`, fp32, for standard normal `noise`."""
    return noise.astype(jnp.float32) * jnp.sqrt(sigma**2 + 1)


def walk(
    network: Callable,
    x: Array,
    condition: dict,
    sigmas: Array,
    guidance: Array | None = None,
    keys: Array | None = None,
    first: Array | int = 0,
) -> Array:
    """Samples like `sample` from the noised `x` at `sigmas[0]` through these levels, the first of number `first`.

    `sigmas` need not end at 0: `walk` over parts of the levels, one after another, is `walk` over all of them.
    """

    def step(x: Array, level: tuple):
        n, sigma, following = level
        x0 = guided(network, x, jnp.full((len(x),), sigma), condition, guidance)
        eps = (x - x0) / sigma if keys is None else step_noise(keys, n, x.shape[1:])
        return x0 + following * eps, None

    return jax.lax.scan(step, x, (first + jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:]))[0]


def guided(network: Callable, x: Array, sigma: Array, condition: dict, guidance: Array | None) -> Array:
    """Returns D(x; sigma) `[b, t, h, w, c]` with classifier-free guidance per frame: D_u + g (D_c - D_u).

    The unconditional branch has zeros for image embedding and conditioning latent, and the same ids. `guidance` is
    `[t]`, or `[b, t]` if videos differ; None computes D_c alone.
    """
    if guidance is None:
        return edm.denoise(network, x, sigma, condition)
    nothing = {k: v if k == "ids" else jnp.zeros_like(v) for k, v in condition.items()}
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), nothing, condition)
    x0_u, x0_c = jnp.split(edm.denoise(network, jnp.concatenate([x, x]), jnp.tile(sigma, 2), both), 2)
    # D is affine in the raw output with the same coefficients in both branches, so guiding either gives the same.
    return x0_u + guidance[..., None, None, None] * (x0_c - x0_u)


def step_noise(keys: Array, n: Array | int, shape: tuple[int, ...]) -> Array:
    """Returns the standard normal `[b, *shape]` added after step `n`; each video's depends on its own key only."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))(keys)


def guidance_ramp(guidance: Sequence[float] | None, frames: int) -> Array | None:
    """Returns guidance weights `[frames]`, a line between the two of `guidance`; None if they would change nothing.

    Without guidance (None), and with both weights 1, the unconditional branch is not computed. diffusers guides only if
    the *last* weight exceeds 1 and ignores the ramp otherwise; here either end may exceed 1.

    Raises:
      UserError: if neither end exceeds 1 (unless both are 1), or `guidance` is not a pair of numbers.
    """
    if guidance is None:
        return None
    if len(guidance) != 2 or not all(math.isfinite(g) and g >= 0 for g in guidance):
        raise UserError(f"guidance takes the weights of the first and the last frame, e.g. 1.0,3.0; got {guidance}")
    first, last = guidance
    if first == last == 1:
        return None
    if max(first, last) <= 1:
        raise UserError(f"guidance {first} to {last}: one end must exceed 1; for no guidance leave it out or give 1,1")
    return jnp.linspace(first, last, frames, dtype=jnp.float32)

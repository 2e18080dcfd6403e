"""Generator as a pure function of its parameters: conditions and noise to latents, by any sampler."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from sfv_jax.diffusion.solvers import SAMPLERS, begin, guidance_ramp, sample, walk
from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.networks import Networks
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.sharding import batch_sharding, on_mesh, replicated_sharding

Array = jax.Array


class Generator:
    """Pure function from parameters, conditions and noise to latents.

    The object contains no parameters, only one compiled program per shape.

    Args:
      unet: config of the UNet.
      dtype: compute dtype of the UNet, one of `networks.DTYPES`. Noise, latents and the sampler's arithmetic are fp32.
      mesh: devices that share batch and parameters; None for one device. The caller places the parameters.
    """

    def __init__(self, unet: UNetConfig, dtype: str = "float32", mesh: Mesh | None = None):
        self.unet, self.dtype, self.mesh = unet, dtype, mesh
        networks = Networks(unet, dtype=dtype)

        @jax.jit
        def generate(params, noise, condition, sigmas, guidance, keys):
            return sample(networks.generator(params), noise, condition, sigmas, guidance, keys)

        @jax.jit
        def step(params, x, condition, sigmas, guidance, keys, first):
            return walk(networks.generator(params), x, condition, sigmas, guidance, keys, first)

        self._generate, self._step = (f if mesh is None else on_mesh(mesh, f) for f in (generate, step))

    def __call__(
        self,
        params: tree.Params,
        condition: dict,
        noise: Array,
        *,
        steps: int = 1,
        guidance: tuple[float, float] | None = None,
        sampler: str = "euler",
        keys: Array | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Array:
        """Returns scaled latents fp32 `[b, t, h, w, c]`.

        Args:
          params: UNet parameters.
          condition: `cond_latent`, `image_embed` and `ids`, as for `solvers.sample`.
          noise: `[b, t, h, w, c]` standard normal.
          steps: calls of the UNet.
          guidance: first and last weight of the ramp over frames; None for no guidance.
          sampler: a key of `SAMPLERS`, see `Sampler.__call__`.
          keys: `[b]` typed keys of the fresh noise; required if the sampler adds any, with more than one step.
          advance: called with 1 after each of several steps. These are then calls of one program, whose results differ
            from those of the program of all steps by rounding.

        Raises:
          UserError: if the sampler is unknown, does not support this number of steps or lacks keys, or if the guidance
            is impossible.
        """
        sigmas, fresh = levels(sampler, steps)
        if not fresh or steps == 1:
            keys = None
        elif keys is None:
            raise UserError(f"sampler {sampler!r} adds fresh noise: it needs one random key per video")
        ramp = guidance_ramp(guidance, noise.shape[1])
        noise, condition, keys = share(self.mesh, (noise, condition, keys))
        if advance is None or steps == 1:
            return self._generate(params, noise, condition, sigmas, ramp, keys)
        sigmas = np.asarray(sigmas, np.float32)
        x = begin(noise, sigmas[0])
        for n in range(steps):
            x = jax.block_until_ready(self._step(params, x, condition, sigmas[n : n + 2], ramp, keys, n))
            advance(1)
        return x


def levels(sampler: str, steps: int) -> tuple[np.ndarray, bool]:
    """Returns the noise levels `[steps + 1]` of a sampler, and whether each step adds fresh noise.

    Raises:
      UserError: if the sampler is unknown or does not support this number of steps.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler].sigmas(steps), SAMPLERS[sampler].fresh


def check(sampler: str, steps: int, guidance: tuple[float, float] | None) -> None:
    """Checks options of `Generator.__call__`, for commands that load a network before they use it.

    Raises:
      UserError: as `Generator.__call__`.
    """
    levels(sampler, steps)
    guidance_ramp(guidance, 1)


def share(mesh: Mesh | None, batch):
    """Places the arrays of a tree `batch` on `mesh`: split by samples if their number is divisible, else replicated."""
    if mesh is None:
        return batch
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    everywhere, split = replicated_sharding(mesh), batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, everywhere if len(x) % parts else split), batch)

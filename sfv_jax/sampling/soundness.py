"""Whether the results of a sampler's stages are finite, and what to do if not."""

from collections.abc import Mapping

import numpy as np
from jax import Array

from sfv_jax.errors import UserError


class NonFiniteError(UserError):
    """A stage of sampling produced NaN or infinity; the message names stage, videos, network, dtype and remedy."""


def require_finite(checks: Mapping[str, Array], count: int, dtype: str, decoding: tuple[str, str]) -> None:
    """Raises NonFiniteError for the first stage with False among its flags.

    Args:
      checks: `{stage: bool [b]}` in the order of the stages.
      count: number of videos; the flags after them are those of padding.
      dtype: compute dtype of the UNet.
      decoding: (name, compute dtype) of the decoder.
    """
    for stage, flags in checks.items():
        bad = np.flatnonzero(~np.asarray(flags)[:count])
        if not len(bad):
            continue
        dtypes = {"denoised latents": ("UNet", dtype), "decoded frames": decoding}
        network, found = dtypes.get(stage, ("VAE encoder" if "latent" in stage else "image encoder", "float32"))
        option = "vae_dtype" if stage == "decoded frames" else "dtype"
        advice = {
            "float16": f"fp16 overflows at 65504: load with {option} bfloat16 or float32",
            "bfloat16": f"try {option} float32, and check the weights",
            "float32": f"the weights or the inputs of the {network} are damaged",
        }
        videos = ", ".join(map(str, bad))
        raise NonFiniteError(f"{stage} of video {videos} not finite ({network} in {found}): {advice[found]}")

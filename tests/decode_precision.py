"""What a lower precision of the VAE decoder costs: PSNR against its fp32 frames, on random weights.

    python -m tests.decode_precision [full]

`full` takes SVD's sizes (97.7 M parameters) instead of the tiny ones. Random weights stress precision more than trained
ones can be assumed to; the figures rank the dtypes.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.codec import SVDCodec
from sfv_jax.models.vae import TemporalVAE, VAEConfig


def random_params(config: VAEConfig, seed: int) -> tree.Params:
    """Norm scales 1 + 0.2 N, biases 0.1 N, mixing factors N, kernels N / sqrt(2 fan in)."""
    rng = np.random.default_rng(seed)

    def fill(path: str, like) -> jax.Array:
        draw = rng.standard_normal(like.shape, np.float32)
        if path.endswith("mix_factor"):
            return jnp.asarray(draw)
        if path.endswith("scale"):
            return jnp.asarray(1 + 0.2 * draw)
        if path.endswith("bias"):
            return jnp.asarray(0.1 * draw)
        return jnp.asarray(draw * (0.5 if draw.ndim > 2 else 1.0) / np.prod(like.shape[:-1]) ** 0.5)

    flat = tree.flatten(tree.abstract(TemporalVAE, config)[1])
    return tree.unflatten({path: fill(str(path), like) for path, like in flat.items()})


def main(full: bool) -> None:
    config, shape = (VAEConfig.svd(), (1, 4, 8, 8, 4)) if full else (VAEConfig.tiny(), (1, 14, 16, 24, 4))
    params = {"vae": random_params(config, 0)}
    latents = config.scaling_factor * np.random.default_rng(1).standard_normal(shape, np.float32)
    frames = {}
    for name in ("float32", "bfloat16", "float16"):
        codec = SVDCodec(config, CLIPConfig.tiny(), params, decode_dtype=jnp.dtype(name))
        frames[name] = np.asarray(codec.decode(latents), np.float64)
        error = np.abs(frames[name] - frames["float32"])
        psnr = 10 * np.log10(255**2 / max(np.mean(error**2), 1e-12))
        deviation = frames["float32"].std()
        print(f"{name}: PSNR {psnr:.1f} dB, largest {error.max():.0f} levels (fp32 deviation {deviation:.1f} levels)")


if __name__ == "__main__":
    main("full" in sys.argv[1:])

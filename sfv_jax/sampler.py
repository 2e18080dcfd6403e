"""From images to videos: one step, or Euler steps with a guidance ramp, as jitted functions and as a `Sampler`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sfv_jax import edm
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec, augmentation_noise
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runs import load_generator
from sfv_jax.state import DTYPES, Networks

Array = jax.Array


def one_step(network: Callable, noise: Array, condition: dict, sigma: float = edm.SIGMA_MAX) -> Array:
    """Clean latents `[b, t, h, w, c]` (fp32, scaled) from `noise` of that shape in one call of `network` (Eq. 6).

    The start is noise * sqrt(sigma^2 + 1), as in diffusers' EulerDiscreteScheduler with one step.
    """
    x = noise.astype(jnp.float32) * jnp.sqrt(jnp.float32(sigma) ** 2 + 1)
    return edm.denoise(network, x, jnp.full((len(x),), sigma, jnp.float32), condition)


def euler(network: Callable, noise: Array, condition: dict, sigmas: Array, guidance: Array | None = None) -> Array:
    """Clean latents by Euler steps on the probability-flow ODE (Eq. 4), under one `lax.scan`. State is fp32.

    Args:
      noise: `[b, t, h, w, c]` standard normal.
      condition: `cond_latent [b, h, w, c]`, `image_embed [b, d]`, `ids [b, 3]`.
      sigmas: `[n + 1]` from `edm.sampling_sigmas(n)`.
      guidance: `[t]` weight of each frame, v = v_u + g (v_c - v_u), the unconditional branch having zeros for image
        embedding and conditioning latent; None for one call per step.
    """

    def velocity(x: Array, sigma: Array) -> Array:
        if guidance is None:
            return edm.denoise(network, x, sigma, condition)
        nothing = {k: v if k == "ids" else jnp.zeros_like(v) for k, v in condition.items()}
        both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), nothing, condition)
        x0_u, x0_c = jnp.split(edm.denoise(network, jnp.concatenate([x, x]), jnp.tile(sigma, 2), both), 2)
        # D is affine in the raw output with the same coefficients in both branches: guiding either is the same.
        return x0_u + guidance[:, None, None, None] * (x0_c - x0_u)

    def step(x: Array, levels: Array):
        sigma, following = levels
        x0 = velocity(x, jnp.full((len(x),), sigma))
        return x + (x - x0) / sigma * (following - sigma), None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    start = noise.astype(jnp.float32) * jnp.sqrt(sigmas[0] ** 2 + 1)
    return jax.lax.scan(step, start, jnp.stack([sigmas[:-1], sigmas[1:]], axis=1))[0]


class Sampler:
    """Images to videos. Load once, call many times; a shape seen before is not compiled again.

    Attributes:
      codec: what turns images into conditions and latents into frames.
      unet: config of the generator; `unet.num_frames` frames are made by default.
      step: training steps of the checkpoint it was loaded from, None for a model folder.
    """

    step: int | None = None

    def __init__(self, unet: UNetConfig, params: tree.Params, codec: SVDCodec | PatchCodec, dtype: str = "float32"):
        self.unet, self.params, self.codec = unet, params, codec
        networks = Networks(unet, dtype=dtype)

        @partial(jax.jit, static_argnames="steps")
        def generate(params, noise, condition, guidance, steps):
            network = networks.generator(params)
            if steps == 1 and guidance is None:
                return one_step(network, noise, condition)
            return euler(network, noise, condition, edm.sampling_sigmas(steps), guidance)

        self._generate = generate

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "float32", raw: bool = False) -> "Sampler":
        """From a model folder (`python -m sfv_jax.convert`) or the workdir of a training run (its newest checkpoint).

        Args:
          dtype: compute dtype of the UNet, one of `state.DTYPES`; parameters are stored in it.
          raw: the trained weights instead of their moving average (workdirs only).
        Raises:
          WeightsError, WorkdirError: if `path` is neither.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        base = load_generator(path, raw=raw)
        params = jax.tree.map(lambda x: jnp.asarray(x, DTYPES[dtype]), base.params)
        sampler = cls(base.unet, params, base.codec, dtype)
        sampler.step = base.step
        return sampler

    def latents(self, condition: dict, noise: Array, *, steps: int = 1, guidance: tuple | None = None) -> Array:
        """Scaled latents `[b, t, h, w, c]` from `noise` of that shape; `condition` as in `euler`."""
        ramp = None if guidance is None else jnp.linspace(*guidance, noise.shape[1], dtype=jnp.float32)
        return self._generate(self.params, noise, condition, ramp, steps)

    def condition(
        self,
        images: Sequence[np.ndarray],
        size: tuple[int, int],
        keys: Array | None,
        ids: Sequence[float],
        noise: Array | None = None,
    ) -> dict:
        """Conditions of `images` (uint8 `[h, w, 3]`, any sizes), each resized to `size (h, w)` without cropping.

        `keys [b]` draw the pixel noise of strength `ids[2]`, unless it is given as `noise [b, h, w, 3]`.
        """
        resized = np.stack([resize(image, size) for image in images])
        # CLIP sees the original, as in diffusers; the patch codec's embedding is defined at the size of the video.
        originals = resized if isinstance(self.codec, PatchCodec) else images
        alike = len({image.shape for image in originals}) == 1
        noise = augmentation_noise(keys, resized.shape[1:]) if noise is None else noise
        parts = [
            self.codec.condition(resized[n], None, ids[2], noise[n], original=np.stack(originals[n]))
            for n in ([slice(None)] if alike else [slice(i, i + 1) for i in range(len(images))])
        ]
        latent, embed = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        if embed.shape[-1] != self.unet.cross_attention_dim:
            raise ValueError(
                f"images of {size[0]}x{size[1]} are embedded in {embed.shape[-1]} numbers, the UNet takes "
                f"{self.unet.cross_attention_dim}: use the size the model was trained at"
            )
        return {"cond_latent": latent, "image_embed": embed, "ids": jnp.tile(jnp.float32(ids), (len(images), 1))}

    def __call__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        *,
        steps: int = 1,
        seed: int | Sequence[int] = 0,
        noise: Array | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float = 7,
        motion_bucket_id: float = 127,
        noise_aug_strength: float = 0.02,
        guidance: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Videos uint8 `[b, t, height, width, 3]`, one per image.

        Args:
          images: uint8 `[h, w, 3]` each; they are stretched to height x width.
          steps: 1 is one forward pass from sigma 700; more are Euler steps.
          seed: of the first image, the next ones count up; or one per image. A video depends on its own seed only.
          noise: `[b, t, height / d, width / d, c]` standard normal to start from instead of drawing it, d the codec's
            downscale.
          height, width: default, those of the first image rounded to what the networks accept.
          fps, motion_bucket_id, noise_aug_strength: SVD's micro-conditions; the model is told fps - 1.
          guidance: first and last weight of the per-frame ramp, e.g. (1.0, 3.0) for SVD; None for no guidance.
        Raises:
          ValueError: for sizes the codec cannot represent, or seeds that do not match the images.
        """
        images = [np.asarray(image) for image in images]
        size = self.size(images[0], height, width)
        seeds = [seed + n for n in range(len(images))] if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(images):
            raise ValueError(f"{len(images)} images need as many seeds, got {len(seeds)}")
        keys = jax.vmap(jax.random.split)(jnp.stack([jax.random.key(s) for s in seeds]))
        condition = self.condition(images, size, keys[:, 0], (fps - 1, motion_bucket_id, noise_aug_strength))
        shape = self.latent_shape(size, num_frames)
        if noise is None:
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys[:, 1])
        elif noise.shape != (len(images), *shape):
            raise ValueError(f"noise has shape {noise.shape}, these images need {(len(images), *shape)}")
        frames = np.asarray(self.codec.decode(self.latents(condition, noise, steps=steps, guidance=guidance)))
        return frames

    def latent_shape(self, size: tuple[int, int], num_frames: int | None = None) -> tuple[int, int, int, int]:
        """`(t, h, w, c)` of the latents of one video of `size (height, width)` pixels."""
        down = self.codec.downscale
        return num_frames or self.unet.num_frames, size[0] // down, size[1] // down, self.codec.latent_channels

    def size(self, image: np.ndarray, height: int | None, width: int | None) -> tuple[int, int]:
        """`(height, width)` to generate at: as given, or the image's rounded down to whole latent cells."""
        down = self.codec.downscale
        default = (max(n // down, 1) * down for n in image.shape[:2])
        size = tuple(given or own for given, own in zip((height, width), default, strict=True))
        for name, n in zip(("height", "width"), size, strict=True):
            if n % down:
                raise ValueError(
                    f"{name} {n} is not a multiple of {down}; nearest: {n // down * down} and {n // down * down + down}"
                )
        return size


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 `[height, width, 3]`: Lanczos, aspect ratio not kept, as StableVideoDiffusionPipeline does it."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 [h, w, 3], got {image.dtype} {image.shape}")
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))

"""Between pixels and what the UNet sees: latents of clips, and the two conditions made from the first image.

Both codecs have the same methods, so that whatever encodes, trains or samples does not know which one it holds.
Latents leave `encode` and `condition` unscaled. The caller multiplies video latents by `scaling_factor`, never the
conditioning latent: SVD was trained that way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from sfv_jax.errors import UserError
from sfv_jax.models import clip, tree
from sfv_jax.models.partitioning import axis_size
from sfv_jax.models.vae import TemporalVAE, VAEConfig

Array = jax.Array
# Encoded at once by default: three frames of 448x768, about 3 GB of fp32 activations at SVD's size.
ENCODE_PIXELS = 2**20
# Temporaries of decoding whole clips, in arrays of the largest activation: 5 compiled for H200, 7 for v5e, 8 on CPU.
WHOLE = 8


def to_signed(pixels: Array) -> Array:
    """fp32 in [-1, 1] of uint8 pixels, any shape."""
    return jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1.0


def to_pixels(x: Array) -> Array:
    """uint8 pixels, rounded and clipped, of `x` nominally in [-1, 1], any shape."""
    return jnp.round(jnp.clip(x.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def augmentation_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal fp32 `[b, *shape]`, one of `keys [b]` per sample: a sample's noise ignores its neighbours.

    Raises:
      ValueError: if `keys` is not a vector of typed keys (`jax.random.split(key, b)`).
    """
    if keys is None or keys.ndim != 1:
        raise ValueError("condition needs one random key per image: keys of shape [b], or the noise itself")
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def finite(x: Array) -> Array:
    """`[b]` bool: whether all of a sample `x [b, ...]` is finite."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def over_time(fn: Callable, x: Array, size: int) -> Array:
    """`fn(x)` for `x [b, t, ...]` and an `fn` that treats every frame alike, at most `size` frames of a clip at a time.

    All chunks are of one length, so `fn` is compiled once; the last one is filled up with copies of the last frame.
    """
    t = x.shape[1]
    count = -(-t // size)
    if count == 1:
        return fn(x)
    length = -(-t // count)
    x = x[:, np.minimum(np.arange(count * length), t - 1)]
    chunks = jax.lax.map(fn, rearrange(x, "b (n t) ... -> n b t ...", n=count))
    return rearrange(chunks, "n b t ... -> b (n t) ...")[:, :t]


def device_memory() -> float | None:
    """Bytes JAX may use of a device of this process; None where it does not tell, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def decode_pixels(config: VAEConfig, shape: tuple[int, ...], dtype, memory: float | None) -> int:
    """`VAEConfig.decode_pixels` for latents `[b, t, h, w, 4]` on devices of `memory` bytes: 0 where that suffices.

    Decoding in pieces needs less than half of the memory and moves about twice the bytes. Whole, it is taken to need
    `WHOLE` arrays of its largest activation, and at most half of the memory of the devices that share the frames.
    """
    b, t, h, w, _ = shape
    largest = b * t * h * w * config.downscale**2 * config.block_out_channels[0] * jnp.dtype(dtype).itemsize
    shares = axis_size("data", "fsdp", "spatial")
    return 0 if memory and WHOLE * largest / shares <= memory / 2 else config.decode_pixels


class SVDCodec:
    """SVD's temporal VAE and CLIP image tower (steps 1, 4, 5 and 10 of StableVideoDiffusionPipeline).

    Args:
      params: `{"vae": ..., "image_encoder": ...}`, nested dicts of arrays, wherever they are placed.
      decode_dtype: compute dtype of the decoder. Encoding and CLIP are fp32, as in the reference. The decoder loses
        precision below fp32 (docs/benchmarks.md), so lower it knowingly.
      pixels: of a piece in which a device decodes, over all frames, in place of `VAEConfig.decode_pixels`; 0: all at
        once. By default it follows from `memory`. Either way the frames are the same.
      memory: bytes of a device (`decode_pixels`); by default what the device tells. Where it tells nothing, as a CPU,
        large frames are decoded in pieces.
    Raises:
      UserError: for negative `pixels`.
    """

    def __init__(
        self,
        vae_config: VAEConfig,
        clip_config: clip.CLIPConfig,
        params: dict[str, tree.Params],
        *,
        decode_dtype=jnp.float32,
        pixels: int | None = None,
        memory: float | None = None,
    ):
        if pixels is not None and pixels < 0:
            raise UserError(f"decode_pixels {pixels}: give the pixels of a piece, or 0 to decode whole")
        self.params, self.pixels, self.memory = params, pixels, memory
        self.vae_config, self.clip_config, self.decode_dtype = vae_config, clip_config, decode_dtype
        self.scaling_factor = vae_config.scaling_factor
        self.latent_channels = vae_config.latent_channels
        self.downscale = vae_config.downscale
        encoder, _ = tree.abstract(TemporalVAE, vae_config)
        tower, _ = tree.abstract(clip.CLIPVision, clip_config)

        def encode(params, frames, size):
            return over_time(lambda x: tree.build(encoder, params).encode(to_signed(x)), frames, size)

        def encode_image(params, images, noise, strength):
            noisy = to_signed(images) + jnp.reshape(strength, (-1, 1, 1, 1)) * noise
            return tree.build(encoder, params).encode(noisy[:, None])[:, 0]

        def embed(params, images):
            unit = jnp.asarray(images).astype(jnp.float32) / 255.0
            return tree.build(tower, params)(clip.preprocess(unit, clip_config.image_size))

        def decode(params, latents, pixels):
            decoder, _ = tree.abstract(TemporalVAE, replace(vae_config, decode_pixels=pixels), dtype=decode_dtype)
            frames = tree.build(decoder, params).decode(latents / vae_config.scaling_factor)
            return to_pixels(frames), finite(frames)

        self._encode = jax.jit(encode, static_argnames="size")
        self._decode = jax.jit(decode, static_argnames="pixels")
        self._encode_image, self._embed = map(jax.jit, (encode_image, embed))

    def encode(self, frames: Array, chunk_size: int | None = None) -> Array:
        """Unscaled posterior means fp32 `[b, t, h/8, w/8, 4]` of `frames` uint8 `[b, t, h, w, 3]`.

        Args:
          chunk_size: frames of a clip encoded at a time, for memory only: the encoder sees each frame by itself.
            Default: as many as make `ENCODE_PIXELS` pixels over the batch, at least one.
        """
        b, _, h, w, _ = frames.shape
        return self._encode(self.params["vae"], frames, chunk_size or max(ENCODE_PIXELS // (b * h * w), 1))

    def encode_image(self, images: Array, noise: Array, noise_aug_strength) -> Array:
        """`cond_latent` of `condition`, from `noise` fp32 `[b, h, w, 3]`."""
        return self._encode_image(self.params["vae"], images, noise, jnp.asarray(noise_aug_strength, jnp.float32))

    def embed(self, images: Array) -> Array:
        """CLIP embeddings fp32 `[b, d]`, not normalised, of `images` uint8 `[b, h, w, 3]` of any size."""
        return self._embed(self.params["image_encoder"], images)

    def condition(
        self, images: Array, keys: Array | None, noise_aug_strength, noise: Array | None = None, original=None
    ):
        """The conditions of a video that starts with `images`.

        Args:
          images: uint8 `[b, h, w, 3]`, at the size of the video.
          keys: `[b]` typed keys of the pixel noise; unused when `noise` is given.
          noise_aug_strength: standard deviation of the pixel noise on [-1, 1], scalar or `[b]`; SVD samples with 0.02.
          noise: standard normal fp32 `[b, h, w, 3]` to use instead.
          original: uint8 `[b, h', w', 3]`, the images before they were resized, for CLIP; default `images`.
        Returns:
          cond_latent: fp32 `[b, h/8, w/8, 4]`, unscaled, of the noised image.
          image_embed: fp32 `[b, d]`, of the clean one.
        """
        noise = augmentation_noise(keys, images.shape[1:]) if noise is None else noise
        return self.encode_image(images, noise, noise_aug_strength), self.embed(
            images if original is None else original
        )

    def decode(self, latents: Array, chunk_size: int | None = None) -> Array:
        """uint8 frames `[b, t, 8h, 8w, 3]` of scaled `latents [b, t, h, w, 4]`.

        Args:
          chunk_size: frames of a clip decoded at a time, default all. Chunks save memory and change the result, as
            diffusers' `decode_chunk_size` does: the decoder mixes frames, and a chunk knows nothing of its neighbours.
            The last chunk may be shorter. A chunk never mixes videos (diffusers' does when it does not divide t).
        """
        return self.decode_checked(latents, chunk_size)[0]

    def decode_checked(self, latents: Array, chunk_size: int | None = None) -> tuple[Array, Array]:
        """As `decode`, and `[b]` bool: whether the frames were finite before they became pixels."""
        t = latents.shape[1]
        size = t if chunk_size is None else chunk_size
        if size < 1:
            raise UserError(f"decode_chunk_size must be at least 1 frame, got {size}")
        pixels = self.pixels
        if pixels is None:
            shape = latents.shape[0], min(size, t), *latents.shape[2:]
            pixels = decode_pixels(self.vae_config, shape, self.decode_dtype, self.memory or device_memory())
        chunks = [self._decode(self.params["vae"], latents[:, n : n + size], pixels) for n in range(0, t, size)]
        frames, sound = zip(*chunks, strict=True)
        return (frames[0], sound[0]) if len(chunks) == 1 else (jnp.concatenate(frames, 1), jnp.stack(sound).all(0))


@dataclass(frozen=True)
class PatchCodec:
    """Pixels as latents, for small procedural videos: patches become channels and nothing is lost.

    The image embedding is the image averaged over `embed_cell` x `embed_cell` pixels and flattened:
    `3 * (h / embed_cell) * (w / embed_cell)` numbers in [-1, 1], 48 for 32 x 32.

    Attributes:
      patch: pixels per latent cell in each direction.
      scaling_factor: what multiplies the latents before diffusion; choose it so that they have about unit variance.
      offset: mean of the signed pixels, taken off before folding, so that latents are about centred.
    """

    patch: int = 4
    scaling_factor: float = 1.0
    embed_cell: int = 8
    offset: float = 0.0

    @property
    def downscale(self) -> int:
        """Pixels per latent cell in each direction."""
        return self.patch

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell."""
        return 3 * self.patch**2

    @partial(jax.jit, static_argnums=0)
    def encode(self, frames: Array) -> Array:
        """Unscaled fp32 `[b, t, h/patch, w/patch, 3 patch^2]` of `frames` uint8 `[b, t, h, w, 3]`."""
        return self._fold(to_signed(frames))

    @partial(jax.jit, static_argnums=0)
    def embed(self, images: Array) -> Array:
        """Coarse images fp32 `[b, d]` of `images` uint8 `[b, h, w, 3]`."""
        n = self.embed_cell
        return rearrange(
            reduce(to_signed(images), "b (h m) (w n) c -> b h w c", "mean", m=n, n=n), "b h w c -> b (h w c)"
        )

    def condition(
        self, images: Array, keys: Array | None, noise_aug_strength, noise: Array | None = None, original=None
    ):
        """`cond_latent [b, h/patch, w/patch, 3 patch^2]` of the noised and `image_embed [b, d]` of the clean image.

        Arguments as in `SVDCodec.condition`.
        """
        noise = augmentation_noise(keys, images.shape[1:]) if noise is None else noise
        return self.encode_image(images, noise, noise_aug_strength), self.embed(
            images if original is None else original
        )

    @partial(jax.jit, static_argnums=0)
    def encode_image(self, images: Array, noise: Array, noise_aug_strength) -> Array:
        """`cond_latent` of `condition`, from `noise` fp32 `[b, h, w, 3]`."""
        strength = jnp.reshape(jnp.asarray(noise_aug_strength, jnp.float32), (-1, 1, 1, 1))
        return self._fold(to_signed(images) + strength * noise)

    def decode(self, latents: Array, chunk_size: int | None = None) -> Array:
        """uint8 frames `[b, t, patch h, patch w, 3]` of scaled `latents [b, t, h, w, 3 patch^2]`.

        `chunk_size` makes no difference: every frame is decoded by itself.
        """
        return self.decode_checked(latents, chunk_size)[0]

    @partial(jax.jit, static_argnums=(0, 2))
    def decode_checked(self, latents: Array, chunk_size: int | None = None) -> tuple[Array, Array]:
        """As `decode`, and `[b]` bool: whether the frames were finite before they became pixels."""
        frames = latents / self.scaling_factor + self.offset
        pixels = rearrange(frames, "... h w (m n c) -> ... (h m) (w n) c", m=self.patch, n=self.patch)
        return to_pixels(pixels), finite(frames)

    def _fold(self, x: Array) -> Array:
        return rearrange(x - self.offset, "... (h m) (w n) c -> ... h w (m n c)", m=self.patch, n=self.patch)

"""Codecs between pixels and the UNet's inputs: latents of clips, and the two conditions made from the first image.

Both codecs have the same methods, so that encoding, training and sampling work with either. `encode` and `condition`
return unscaled latents. The caller multiplies video latents by `scaling_factor`, but never the conditioning latent: SVD
was trained that way.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from sfv_jax.errors import UserError
from sfv_jax.models import clip, tree
from sfv_jax.models.decoders import FullDecoder, TinyDecoder, finite, to_pixels
from sfv_jax.models.tiny_decoder import TinyDecoderConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig

Array = jax.Array
# Pixels encoded at once by default: three frames of 448x768, about 3 GB of fp32 activations at SVD's size.
ENCODE_PIXELS = 2**20


def to_signed(pixels: Array | np.ndarray) -> Array:
    """Returns uint8 pixels of any shape as fp32 in [-1, 1]."""
    return jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1.0


def augmentation_noise(keys: Array | None, shape: tuple[int, ...]) -> Array:
    """Returns standard normal fp32 `[b, *shape]`, one of `keys [b]` per sample: each sample's noise has its own key.

    Raises:
      ValueError: if `keys` is not a vector of typed keys (`jax.random.split(key, b)`).
    """
    if keys is None or keys.ndim != 1:
        raise ValueError("condition needs one random key per image: keys of shape [b], or the noise itself")
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def over_time(fn: Callable, x: Array, size: int) -> Array:
    """Computes `fn(x)` of `x [b, t, ...]` in chunks of at most `size` frames of each clip.

    `fn` must treat each frame separately. All chunks have one length, so `fn` is compiled once; the last one is padded
    with copies of the last frame.
    """
    t = x.shape[1]
    count = -(-t // size)
    if count == 1:
        return fn(x)
    length = -(-t // count)
    x = x[:, np.minimum(np.arange(count * length), t - 1)]
    chunks = jax.lax.map(fn, rearrange(x, "b (n t) ... -> n b t ...", n=count))
    return rearrange(chunks, "n b t ... -> b (n t) ...")[:, :t]


class SVDCodec:
    """SVD's temporal VAE and CLIP image tower (steps 1, 4, 5 and 10 of StableVideoDiffusionPipeline).

    Args:
      params: `{"vae": ..., "image_encoder": ...}`, and `"tiny_decoder"` with `tiny`; nested dicts of arrays with any
        placement.
      tiny: decode by this tiny decoder instead of the VAE's own.
      decode_dtype: compute dtype of the decoder. Encoding and CLIP are fp32, as in the reference. The decoder loses
        precision below fp32 (docs/benchmarks.md), so lower it knowingly.
      pixels: overrides `VAEConfig.decode_pixels`, the pixels that a device decodes at a time, over all frames; 0: all
        at once. By default it follows from `memory`. The frames are the same with any value.
      memory: bytes per device, see `decode_pixels`; by default `device_memory()`. If that is None, as on CPU, large
        frames are decoded in pieces.

    Raises:
      UserError: if `pixels` is negative.
    """

    def __init__(
        self,
        vae_config: VAEConfig,
        clip_config: clip.CLIPConfig,
        params: dict[str, tree.Params],
        *,
        tiny: TinyDecoderConfig | None = None,
        decode_dtype=jnp.float32,
        pixels: int | None = None,
        memory: float | None = None,
    ):
        if pixels is not None and pixels < 0:
            raise UserError(f"decode_pixels {pixels}: give the pixels of a piece, or 0 to decode whole")
        self.params, self.decode_dtype = params, decode_dtype
        self.vae_config, self.clip_config = vae_config, clip_config
        options = (decode_dtype, pixels, memory)
        self._decoders = lambda tiny: FullDecoder(vae_config, *options) if tiny is None else TinyDecoder(tiny, *options)
        self.decoder = self._decoders(tiny)
        self.scaling_factor = vae_config.scaling_factor
        self.latent_channels = vae_config.latent_channels
        self.downscale = vae_config.downscale
        encoder, _ = tree.abstract(TemporalVAE, vae_config)

        def encode(params, frames, size):
            return over_time(lambda x: tree.build(encoder, params).encode(to_signed(x)), frames, size)

        def encode_image(params, images, noise, strength):
            noisy = to_signed(images) + jnp.reshape(strength, (-1, 1, 1, 1)) * noise
            return tree.build(encoder, params).encode(noisy[:, None])[:, 0]

        self._encode = jax.jit(encode, static_argnames="size")
        self._encode_image, self._embed = jax.jit(encode_image), clip.embedder(clip_config)

    def with_params(self, params: dict[str, tree.Params]) -> "SVDCodec":
        """Returns the same codec, compiled programs included, with other parameters."""
        other = copy(self)
        other.params = params
        return other

    def with_decoder(self, tiny: TinyDecoderConfig | None, params: tree.Params | None = None) -> "SVDCodec":
        """Returns the same codec, encoders and their compiled programs included, with another decoder of frames.

        Args:
          tiny: the config of a tiny decoder; None for the VAE's own decoder.
          params: the parameters of the tiny decoder.
        """
        other = copy(self)
        other.params = self.params if params is None else self.params | {"tiny_decoder": params}
        other.decoder = self._decoders(tiny)
        return other

    def encode(self, frames: Array | np.ndarray, chunk_size: int | None = None) -> Array:
        """Returns unscaled posterior means fp32 `[b, t, h/8, w/8, 4]` of `frames` uint8 `[b, t, h, w, 3]`.

        Args:
          frames: pixels.
          chunk_size: frames of a clip encoded at a time. It changes memory only, as the encoder treats each frame
            separately. Default: as many as make `ENCODE_PIXELS` pixels over the batch, at least one.
        """
        b, _, h, w, _ = frames.shape
        return self._encode(self.params["vae"], frames, chunk_size or max(ENCODE_PIXELS // (b * h * w), 1))

    def encode_image(self, images: Array, noise: Array, noise_aug_strength) -> Array:
        """Returns `cond_latent` of `condition`, given `noise` fp32 `[b, h, w, 3]`."""
        return self._encode_image(self.params["vae"], images, noise, jnp.asarray(noise_aug_strength, jnp.float32))

    def embed(self, images: Array | np.ndarray) -> Array:
        """Returns CLIP embeddings fp32 `[b, d]`, not normalized, of `images` uint8 `[b, h, w, 3]` of any size."""
        return self._embed(self.params["image_encoder"], images)

    def condition(
        self, images: Array, keys: Array | None, noise_aug_strength, noise: Array | None = None, original=None
    ):
        """Returns the conditions of videos that start with `images`.

        Args:
          images: uint8 `[b, h, w, 3]`, at the size of the video.
          keys: `[b]` typed keys of the pixel noise; unused if `noise` is given.
          noise_aug_strength: standard deviation of the pixel noise on [-1, 1], scalar or `[b]`; SVD samples with 0.02.
          noise: standard normal fp32 `[b, h, w, 3]` in place of noise from `keys`.
          original: uint8 `[b, h', w', 3]`, the images before resizing, for CLIP; default `images`.

        Returns:
          cond_latent: fp32 `[b, h/8, w/8, 4]`, unscaled, of the noised image.
          image_embed: fp32 `[b, d]`, of the clean image.

        Raises:
          ValueError: if there is neither `noise` nor one key per image.
        """
        noise = augmentation_noise(keys, images.shape[1:]) if noise is None else noise
        return self.encode_image(images, noise, noise_aug_strength), self.embed(
            images if original is None else original
        )

    def decode(self, latents: Array | np.ndarray, chunk_size: int | None = None) -> Array:
        """Returns uint8 frames `[b, t, 8h, 8w, 3]` of scaled `latents [b, t, h, w, 4]`.

        Args:
          latents: scaled latents.
          chunk_size: frames of a clip decoded at a time, default all. Chunks save memory. They change the result of the
            VAE's decoder, like diffusers' `decode_chunk_size`: it mixes frames, but only within a chunk. The last chunk
            may be shorter. A chunk never mixes videos (diffusers' chunks do if their size does not divide t). A tiny
            decoder carries its memory from chunk to chunk: its frames stay the same.

        Raises:
          UserError: if `chunk_size` is below 1.
        """
        return self.decode_checked(latents, chunk_size)[0]

    def decode_checked(
        self,
        latents: Array | np.ndarray,
        chunk_size: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Array, Array]:
        """Returns the frames of `decode`, and bool `[b]`: whether they were finite before conversion to pixels.

        `advance` is called with the number of frames of each of several chunks when they are there.
        """
        return self.decoder(self.params, latents, chunk_size, advance)

    def stream(self, latents: Array | np.ndarray) -> Iterator[tuple[Array, Array]]:
        """Yields frames uint8 `[b, 8h, 8w, 3]` in turn, with bool `[b]`: whether they were finite.

        A tiny decoder yields each frame as it is decoded; the VAE's decodes all frames before the first.
        """
        return self.decoder.stream(self.params, latents)


@dataclass(frozen=True)
class PatchCodec:
    """Pixels as latents, for small procedural videos: patches become channels, without loss.

    The image embedding is the image averaged over `embed_cell` x `embed_cell` pixels and flattened:
    `3 * (h / embed_cell) * (w / embed_cell)` numbers in [-1, 1], 48 for 32 x 32.

    Attributes:
      patch: pixels per latent cell in each direction.
      scaling_factor: factor of the latents before diffusion; choose it so that they have about unit variance.
      embed_cell: side of the averaged cells, in pixels.
      offset: mean of the signed pixels, subtracted before folding, so that latents are roughly centered.
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
    def encode(self, frames: Array | np.ndarray) -> Array:
        """Returns unscaled fp32 `[b, t, h/patch, w/patch, 3 patch^2]` of `frames` uint8 `[b, t, h, w, 3]`."""
        return self._fold(to_signed(frames))

    @partial(jax.jit, static_argnums=0)
    def embed(self, images: Array | np.ndarray) -> Array:
        """Returns coarse images fp32 `[b, d]` of `images` uint8 `[b, h, w, 3]`."""
        n = self.embed_cell
        return rearrange(
            reduce(to_signed(images), "b (h m) (w n) c -> b h w c", "mean", m=n, n=n), "b h w c -> b (h w c)"
        )

    def condition(
        self, images: Array, keys: Array | None, noise_aug_strength, noise: Array | None = None, original=None
    ):
        """Returns the conditions of videos that start with `images`; arguments as in `SVDCodec.condition`.

        Returns:
          cond_latent: fp32 `[b, h/patch, w/patch, 3 patch^2]`, unscaled, of the noised image.
          image_embed: fp32 `[b, d]`, of the clean image.
        """
        noise = augmentation_noise(keys, images.shape[1:]) if noise is None else noise
        return self.encode_image(images, noise, noise_aug_strength), self.embed(
            images if original is None else original
        )

    @partial(jax.jit, static_argnums=0)
    def encode_image(self, images: Array, noise: Array, noise_aug_strength) -> Array:
        """Returns `cond_latent` of `condition`, given `noise` fp32 `[b, h, w, 3]`."""
        strength = jnp.reshape(jnp.asarray(noise_aug_strength, jnp.float32), (-1, 1, 1, 1))
        return self._fold(to_signed(images) + strength * noise)

    def decode(self, latents: Array, chunk_size: int | None = None) -> Array:
        """Returns uint8 frames `[b, t, patch h, patch w, 3]` of scaled `latents [b, t, h, w, 3 patch^2]`.

        `chunk_size` makes no difference, as each frame is decoded separately.
        """
        return self.decode_checked(latents, chunk_size)[0]

    def stream(self, latents: Array | np.ndarray) -> Iterator[tuple[Array, Array]]:
        """Yields the frames of `decode` in turn, see `SVDCodec.stream`."""
        frames, sound = self.decode_checked(latents)
        for n in range(frames.shape[1]):
            yield frames[:, n], sound

    @partial(jax.jit, static_argnums=(0, 2))
    def decode_checked(self, latents: Array, chunk_size: int | None = None) -> tuple[Array, Array]:
        """Returns the frames of `decode`, and bool `[b]`: whether they were finite before conversion to pixels."""
        frames = latents / self.scaling_factor + self.offset
        pixels = rearrange(frames, "... h w (m n c) -> ... (h m) (w n) c", m=self.patch, n=self.patch)
        return to_pixels(pixels), finite(frames)

    def _fold(self, x: Array) -> Array:
        return rearrange(x - self.offset, "... (h m) (w n) c -> ... h w (m n c)", m=self.patch, n=self.patch)

"""Decoders of a codec: the VAE's own, which mixes all frames, and a tiny one that can decode frame by frame.

Both are functions `(params, latents, chunk_size, advance) -> (frames, sound)` of the codec's parameters, and have
`stream`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.partitioning import axis_size
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.models.vae import TemporalVAE, VAEConfig

Array = jax.Array
# Peak memory of untiled decoding, in multiples of the largest activation: 5 compiled for H200, 7 for v5e, 8 on CPU.
WHOLE = 8


def to_pixels(x: Array) -> Array:
    """Returns `x` of any shape, nominally in [-1, 1], as uint8 pixels, rounded and clipped."""
    return unit_to_pixels(x.astype(jnp.float32) / 2 + 0.5)


def unit_to_pixels(x: Array) -> Array:
    """Returns `x` of any shape, nominally in [0, 1], as uint8 pixels, rounded and clipped."""
    return jnp.round(jnp.clip(x.astype(jnp.float32), 0.0, 1.0) * 255.0).astype(jnp.uint8)


def finite(x: Array) -> Array:
    """Returns bool `[b]`: whether all elements of a sample of `x [b, ...]` are finite."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def device_memory() -> float | None:
    """Returns the bytes that JAX may use on a device of this process; None if unavailable, as on CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def decode_pixels(config: VAEConfig | TinyDecoderConfig, shape: tuple[int, ...], dtype, memory: float | None) -> int:
    """Returns `VAEConfig.decode_pixels` for latents of `shape`, or 0 if memory suffices to decode whole.

    Decoding in pieces needs less than half of the memory and moves about twice the bytes. Decoding whole is chosen if
    `WHOLE` times the largest activation fits in half of the memory of the devices that share the frames.

    Args:
      config: the VAE or the tiny decoder.
      shape: `[b, t, h, w, c]` of the latents.
      dtype: compute dtype of the decoder.
      memory: bytes per device; None if unknown.
    """
    full = isinstance(config, VAEConfig)
    b, t, h, w, _ = shape
    width = config.block_out_channels[0 if full else -1]  # at the resolution of pixels
    largest = b * t * h * w * config.downscale**2 * width * jnp.dtype(dtype).itemsize
    shares = axis_size("data", "fsdp", "spatial")
    pieces = config.decode_pixels if full else VAEConfig.decode_pixels
    return 0 if memory and WHOLE * largest / shares <= memory / 2 else pieces


def checked_size(chunk_size: int | None, t: int) -> int:
    """Returns the frames of a chunk, by default all `t`.

    Raises:
      UserError: if `chunk_size` is below 1.
    """
    size = t if chunk_size is None else chunk_size
    if size < 1:
        raise UserError(f"decode_chunk_size must be at least 1 frame, got {size}")
    return size


class FullDecoder:
    """The VAE's decoder, with the parameters `vae`.

    Args:
      config: the VAE.
      dtype: compute dtype.
      pixels, memory: see `SVDCodec`.
    """

    title = "VAE decoder"

    def __init__(self, config: VAEConfig, dtype, pixels: int | None, memory: float | None):
        self.config, self.dtype, self.pixels, self.memory = config, dtype, pixels, memory

        def decode(params, latents, pixels):
            graph, _ = tree.abstract(TemporalVAE, replace(config, decode_pixels=pixels), dtype=dtype)
            frames = tree.build(graph, params).decode(latents / config.scaling_factor)
            return to_pixels(frames), finite(frames)

        self._decode = jax.jit(decode, static_argnames="pixels")

    def __call__(
        self,
        params: dict,
        latents: Array | np.ndarray,
        chunk_size: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Array, Array]:
        """Returns uint8 frames `[b, t, H, W, 3]` and bool `[b]`, see `SVDCodec.decode_checked`."""
        t = latents.shape[1]
        size, pixels = checked_size(chunk_size, t), self.pixels
        if pixels is None:
            shape = latents.shape[0], min(size, t), *latents.shape[2:]
            pixels = decode_pixels(self.config, shape, self.dtype, self.memory or device_memory())
        chunks = []
        for n in range(0, t, size):
            chunks.append(self._decode(params["vae"], latents[:, n : n + size], pixels))
            if advance and size < t:
                advance(jax.block_until_ready(chunks[-1])[0].shape[1])
        frames, sound = zip(*chunks, strict=True)
        return (frames[0], sound[0]) if len(chunks) == 1 else (jnp.concatenate(frames, 1), jnp.stack(sound).all(0))

    def stream(self, params: dict, latents: Array | np.ndarray) -> Iterator[tuple[Array, Array]]:
        """Yields the frames uint8 `[b, H, W, 3]` in turn after decoding all of them, with bool `[b]` of all."""
        frames, sound = self(params, latents)
        for n in range(frames.shape[1]):
            yield frames[:, n], sound


class TinyDecoder:
    """A tiny decoder, with the parameters `tiny_decoder`; arguments as for `FullDecoder`."""

    title = "tiny decoder"

    def __init__(self, config: TinyDecoderConfig, dtype, pixels: int | None, memory: float | None):
        self.config, self.dtype, self.pixels, self.memory = config, dtype, pixels, memory
        graph, _ = tree.abstract(TinyTemporalDecoder, config, dtype=dtype)

        def decode(params, latents, frames):
            y = tree.build(graph, params)(latents, frames)
            return unit_to_pixels(y), finite(y)

        def step(params, latent, memory):
            y, memory = tree.build(graph, params).advance(latent[:, None], memory)
            return unit_to_pixels(y[:, 0]), finite(y), memory

        self._decode = jax.jit(decode, static_argnames="frames")
        self._start = jax.jit(lambda params, size: tree.build(graph, params).start(size), static_argnames="size")
        self._step = jax.jit(step, donate_argnums=2)

    def __call__(
        self,
        params: dict,
        latents: Array | np.ndarray,
        chunk_size: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Array, Array]:
        """Returns uint8 frames `[b, t, H, W, 3]` and bool `[b]`, the same for every `chunk_size`."""
        b, t, h, w, _ = latents.shape
        size, pixels = checked_size(chunk_size, t), self.pixels
        if pixels is None:
            pixels = decode_pixels(self.config, latents.shape, self.dtype, self.memory or device_memory())
        one = b * h * w * self.config.downscale**2 / axis_size("data", "fsdp", "spatial")
        at_once = min(size, max(int(pixels // one), 1)) if pixels else size
        frames, sound = self._decode(params["tiny_decoder"], latents, at_once)
        if advance and size < t:
            advance(jax.block_until_ready(frames).shape[1])
        return frames, sound

    def stream(self, params: dict, latents: Array | np.ndarray) -> Iterator[tuple[Array, Array]]:
        """Yields each frame uint8 `[b, H, W, 3]` as it is decoded, with bool `[b]`: whether it was finite."""
        b, t, h, w, _ = latents.shape
        memory = self._start(params["tiny_decoder"], (b, h, w))
        for n in range(t):
            frame, sound, memory = self._step(params["tiny_decoder"], latents[:, n], memory)
            yield frame, sound

"""Tiny temporal decoder of video latents: 1.6 M parameters, and 1/16 of the FLOPs of SVD's decoder.

The layout is that of TAESDV (madebyollin/taesdv, MIT): 3x3 convolutions, nearest upsampling, and blocks that see one
frame of the past. So frames can be decoded all at once, or one after another with one array per block carried along.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sfv_jax.errors import UserError
from sfv_jax.models.layers import Conv2d, Upsample, fp32
from sfv_jax.models.partitioning import rows

Array = jax.Array
Memory = tuple[Array, ...]  # of each MemBlock, its input one frame earlier: [b, 1, h, w, c]


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes of a tiny decoder; the defaults are those of TAESDV.

    Attributes:
      latent_channels: channels of the latents.
      out_channels: channels of the frames.
      block_out_channels: width of each level, from the latents' resolution to the pixels'; every level but the last is
        followed by an upsampling to twice the size.
      layers_per_block: blocks with memory of each level.
      mid_layers: residual blocks without memory before them, at the latents' resolution; TAESDV has none.

    Raises:
      UserError: if the levels of `block_out_channels` and `layers_per_block` differ, or nothing would mix frames.
    """

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    layers_per_block: tuple[int, ...] = (3, 3, 3, 1)
    mid_layers: int = 0

    def __post_init__(self):
        if len(self.block_out_channels) != len(self.layers_per_block):
            found = f"{len(self.block_out_channels)} and {len(self.layers_per_block)}"
            raise UserError(f"block_out_channels and layers_per_block have {found} levels: give both one entry a level")
        if not sum(self.layers_per_block):
            raise UserError("layers_per_block has no block with memory: nothing would mix frames")

    @classmethod
    def narrow(cls, latent_channels: int = 4, downscale: int = 8) -> "TinyDecoderConfig":
        """Returns the layout of TAESDV, with as many levels as `downscale`, a power of two, needs."""
        levels = downscale.bit_length()
        return cls(latent_channels, 3, (64,) * levels, (3,) * (levels - 1) + (1,))

    @classmethod
    def wide(cls, latent_channels: int = 4, downscale: int = 8) -> "TinyDecoderConfig":
        """Returns a decoder of our own with eight times as many parameters, most of them where pixels are few.

        The two lowest levels cost as much per block as the narrow level after them: twice the width at a quarter of the
        pixels. Two residual blocks without memory see a wider surrounding first.
        """
        levels = downscale.bit_length()
        widths = (256, 128, *(64,) * levels)[:levels]
        return cls(latent_channels, 3, widths, (3,) * (levels - 1) + (1,), mid_layers=2)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


VARIANTS = {"tiny": TinyDecoderConfig.narrow, "wide": TinyDecoderConfig.wide}


class Block(nnx.Module):
    """relu(f(x) + x), where f is three 3x3 convolutions with ReLUs between them (TAESD's Block)."""

    def __init__(self, channels: int, *, inputs: int | None = None, **kw):
        self.conv1 = Conv2d(inputs or channels, channels, 3, padding=1, **kw)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, **kw)
        self.conv3 = Conv2d(channels, channels, 3, padding=1, **kw)

    def __call__(self, x: Array, past: Array | None = None) -> Array:
        seen = x if past is None else jnp.concatenate([x, past], axis=-1)
        h = nnx.relu(rows(self.conv1(seen)))
        return rows(nnx.relu(self.conv3(nnx.relu(rows(self.conv2(h)))) + x))


class MemBlock(Block):
    """relu(f([x, m]) + x), where m is the block's input one frame earlier, and zero at frame 0 (TAESDV's MemBlock)."""

    def __init__(self, channels: int, **kw):
        super().__init__(channels, inputs=2 * channels, **kw)

    def remember(self, x: Array, memory: Array) -> tuple[Array, Array]:
        """Returns the output for `x [b, t, h, w, c]` after `memory [b, 1, h, w, c]`, and the memory after it."""
        return self(x, jnp.concatenate([memory, x[:, :-1]], axis=1)), x[:, -1:]


class Level(nnx.Module):
    """Blocks with memory of one resolution, and the upsampling to the next."""

    def __init__(self, channels: int, layers: int, after: int | None, **kw):
        self.blocks = nnx.List([MemBlock(channels, **kw) for _ in range(layers)])
        self.upsampler = Upsample(channels, after, use_bias=False, **kw) if after else None


class TinyTemporalDecoder(nnx.Module):
    """Decoder from latents as the UNet sees them (scaled) to frames, nominally in [0, 1]."""

    def __init__(self, config: TinyDecoderConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1, **kw)
        self.mid_blocks = nnx.List([Block(widths[0], **kw) for _ in range(config.mid_layers)])
        self.up_blocks = nnx.List(
            Level(width, layers, after, **kw)
            for width, layers, after in zip(widths, config.layers_per_block, (*widths[1:], None), strict=True)
        )
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1, **kw)
        self.config, self.dtype = config, dtype

    def __call__(self, latents: Array, frames: int = 0) -> Array:
        """Returns frames `[b, t, H, W, 3]` of scaled `latents [b, t, h, w, c]`.

        Args:
          latents: scaled latents.
          frames: frames that are computed at a time, with the memories carried on; 0: all. It changes memory and speed.
        """
        b, t, h, w, _ = latents.shape
        memory = self.start((b, h, w))
        if not frames or frames >= t:
            return self.advance(latents, memory)[0]
        count = -(-t // frames)
        padded = jnp.pad(latents, ((0, 0), (0, count * frames - t), (0, 0), (0, 0), (0, 0)))  # no frame sees later ones
        pieces = jnp.moveaxis(padded.reshape(b, count, frames, *latents.shape[2:]), 1, 0)

        def piece(memory: Memory, x: Array) -> tuple[Memory, Array]:
            y, memory = self.advance(x, memory)
            return memory, y

        y = jnp.moveaxis(lax.scan(piece, memory, pieces)[1], 0, 1)
        return y.reshape(b, count * frames, *y.shape[3:])[:, :t]

    def start(self, size: tuple[int, int, int]) -> Memory:
        """Returns the memories before the first frame, zeros, for latents of `size (b, h, w)`."""
        b, h, w = size
        shapes = [
            (b, 1, h << n, w << n, self.config.block_out_channels[n])
            for n, level in enumerate(self.up_blocks)
            for _ in level.blocks
        ]
        return tuple(jnp.zeros(shape, self.dtype) for shape in shapes)

    def advance(self, latents: Array, memory: Memory) -> tuple[Array, Memory]:
        """Returns the frames of the next `latents [b, t, h, w, c]`, and the memories after them.

        Args:
          latents: scaled latents of consecutive frames.
          memory: result of `start`, or of the call with the frames before.
        """
        frames, _, memory = self.features(latents, memory)
        return frames, memory

    def features(self, latents: Array, memory: Memory) -> tuple[Array, list[Array], Memory]:
        """Returns the results of `advance`, and between them the output of each level before its upsampling."""
        before, after, levels = iter(memory), [], []
        x = 3 * jnp.tanh(fp32(latents) / 3)
        x = nnx.relu(rows(self.conv_in(rows(x))))
        for block in self.mid_blocks:
            x = block(x)
        for level in self.up_blocks:
            for block in level.blocks:
                x, last = block.remember(x, next(before))
                after.append(last)
            levels.append(x)
            x = x if level.upsampler is None else level.upsampler(x)
        return self.conv_out(x), levels, tuple(after)

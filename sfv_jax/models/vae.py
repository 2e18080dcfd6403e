"""The temporal VAE of Stable Video Diffusion (diffusers AutoencoderKLTemporalDecoder)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sfv_jax.errors import UserError
from sfv_jax.models import tiling
from sfv_jax.models.attention import attention
from sfv_jax.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    ResnetBlock,
    SpatioTemporalResBlock,
    TemporalConv,
    Upsample,
)
from sfv_jax.models.partitioning import flat, rows, unflat

Array = jax.Array


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; field names follow diffusers' `vae/config.json` where it has them.

    `decode_pixels` bounds the memory of decoding, with the same result. Levels that have more than four times as many
    pixels per device, over all frames, are computed in pieces of at most this many (or of one frame); 0 turns it off.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    sample_size: int = 768
    norm_groups: int = 32
    temporal_conv: str = "auto"
    decode_pixels: int = 2**18

    @classmethod
    def svd(cls, **changes) -> "VAEConfig":
        """Returns the VAE of SVD and SVD-XT: 97,742,847 parameters, a downscale of 8."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes) -> "VAEConfig":
        """Returns four narrow levels for tests on CPU; the downscale is 8, as in SVD."""
        sizes: dict[str, Any] = dict(block_out_channels=(32, 32, 64, 64), sample_size=64, temporal_conv="matmul")
        return cls(**sizes | changes)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


class MidAttention(nnx.Module):
    """Single-head attention over the pixels of each frame, with norm and residual (diffusers Attention with biases)."""

    def __init__(self, channels: int, *, groups: int, **kw):
        self.group_norm = GroupNorm(channels, groups=groups, eps=1e-6, per_frame=True, **kw)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, **kw) for _ in range(3))
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Array) -> Array:
        b, _, h, w, _ = x.shape
        tokens = rearrange(flat(self.group_norm(x)), "b t s c -> (b t) s 1 c")
        out = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + unflat(rearrange(self.to_out[0](out), "(b t) s 1 c -> b t s c", b=b), h, w)


class Blocks(nnx.Module):
    """One level or the middle of the VAE: resnets, and at most one of attention, downsampler, upsampler.

    The attention precedes the second resnet, so a middle with one resnet never runs it (as in diffusers).
    """

    def __init__(self, resnets, *, attention=None, downsampler=None, upsampler=None):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List([attention]) if attention is not None else None
        self.downsamplers = nnx.List([downsampler]) if downsampler is not None else None
        self.upsamplers = nnx.List([upsampler]) if upsampler is not None else None

    def __call__(self, x: Array) -> Array:
        for n, resnet in enumerate(self.resnets):
            if n == 1 and self.attentions is not None:
                x = self.attentions[0](x)
            x = rows(resnet(x))
        for sampler in (self.downsamplers, self.upsamplers):
            x = x if sampler is None else sampler[0](x)
        return x


class Encoder(nnx.Module):
    """Image encoder, applied to each frame: `[b, t, h, w, 3] -> [b, t, h/8, w/8, 2 * latent_channels]`."""

    def __init__(self, config: VAEConfig, **kw):
        channels, groups = config.block_out_channels, config.norm_groups
        resnet: dict[str, Any] = dict(temb_channels=None, groups=groups, eps=1e-6, **kw)
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1, **kw)
        self.down_blocks = nnx.List(
            Blocks(
                [
                    ResnetBlock(channels[max(n - 1, 0)] if j == 0 else c, c, **resnet)
                    for j in range(config.layers_per_block)
                ],
                downsampler=Downsample(c, padding=((0, 1), (0, 1)), **kw) if n < len(channels) - 1 else None,
            )
            for n, c in enumerate(channels)
        )
        last = channels[-1]
        self.mid_block = Blocks(
            [ResnetBlock(last, last, **resnet) for _ in range(2)], attention=MidAttention(last, groups=groups, **kw)
        )
        self.conv_norm_out = GroupNorm(last, groups=groups, eps=1e-6, per_frame=True, **kw)
        self.conv_out = Conv2d(last, 2 * config.latent_channels, 3, padding=1, **kw)

    def __call__(self, x: Array) -> Array:
        x = rows(self.conv_in(rows(x)))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class TemporalDecoder(nnx.Module):
    """Decoder that mixes frames in every resnet and once more in RGB: `[b, t, h, w, 4] -> [b, t, 8h, 8w, 3]`."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        channels, groups = config.block_out_channels[::-1], config.norm_groups

        def resnet(i: int, o: int) -> SpatioTemporalResBlock:
            return SpatioTemporalResBlock(
                i,
                o,
                temb_channels=None,
                groups=groups,
                eps=1e-6,
                temporal_eps=1e-5,
                alpha=0.0,
                switch=True,
                form=config.temporal_conv,
                **kw,
            )

        self.pixels = config.decode_pixels
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1, **kw)
        self.mid_block = Blocks(
            [resnet(channels[0], channels[0]) for _ in range(config.layers_per_block)],
            attention=MidAttention(channels[0], groups=groups, **kw),
        )
        self.up_blocks = nnx.List(
            Blocks(
                [resnet(channels[max(n - 1, 0)] if j == 0 else c, c) for j in range(config.layers_per_block + 1)],
                upsampler=Upsample(c, **kw) if n < len(channels) - 1 else None,
            )
            for n, c in enumerate(channels)
        )
        self.conv_norm_out = GroupNorm(channels[-1], groups=groups, eps=1e-6, per_frame=True, **kw)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1, **kw)
        self.time_conv_out = TemporalConv(config.out_channels, config.out_channels, form=config.temporal_conv, **kw)

    def __call__(self, x: Array) -> Array:
        return self.features(x)[0]

    def features(self, x: Array) -> tuple[Array, list[Array]]:
        """Returns the frames, and the output of each level `[b, t, h, w, c]` before its upsampling."""
        levels = []
        x = self.mid_block(rows(self.conv_in(rows(x))))
        for n, block in enumerate(self.up_blocks):
            for m, resnet in enumerate(block.resnets):
                # pyrefly: ignore[unsupported-operation]  # all levels but the last have an upsampler
                grow = self.up_blocks[n - 1].upsamplers[0] if n > 0 and m == 0 else None
                x = self._resnet(resnet, x, grow)
            levels.append(x)
        frames = tiling.frame_pieces(x, x.shape[2:4], self.pixels)
        x = tiling.in_pieces(lambda x: self.conv_out(nnx.silu(self.conv_norm_out(x))), x, 1, frames)
        return self.time_conv_out(x), levels

    def _resnet(self, resnet: SpatioTemporalResBlock, x: Array, grow: Upsample | None) -> Array:
        """Returns `resnet(grow(x))`, or `resnet(x)` without `grow`; in pieces if frames are large."""
        factor = 1 if grow is None else 2
        frames = tiling.frame_pieces(x, (factor * x.shape[2], factor * x.shape[3]), self.pixels)

        def spatial(x: Array) -> Array:
            return rows(resnet.spatial_res_block(x if grow is None else grow(x)))

        return tiling.mix(resnet, tiling.in_pieces(spatial, x, 1, frames), self.pixels)


class TemporalVAE(nnx.Module):
    """Encoder and decoder between frames in [-1, 1] and unscaled latents.

    Callers apply `scaling_factor`, because only video latents are scaled and not the conditioning latent.
    """

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.encoder = Encoder(config, **kw)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1, **kw)
        self.decoder = TemporalDecoder(config, **kw)
        self.config = config

    def encode(self, frames: Array) -> Array:
        """Returns the unscaled posterior mean `[b, t, h/8, w/8, 4]` of `frames [b, t, h, w, 3]` in [-1, 1].

        Raises:
          UserError: if height or width is not a multiple of the downscale.
        """
        return self.posterior(frames)[0]

    def posterior(self, frames: Array) -> tuple[Array, Array]:
        """Returns mean and log variance of the unscaled latents, each as the result of `encode`, which raises alike."""
        h, w = frames.shape[2:4]
        step = self.config.downscale
        if h % step or w % step:
            raise UserError(f"frames of {h}x{w}: height and width must be multiples of {step}")
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(frames)), 2, axis=-1)
        return mean, log_variance

    def decode(self, latents: Array) -> Array:
        """Returns frames `[b, t, 8h, 8w, 3]`, nominally in [-1, 1], from unscaled `latents [b, t, h, w, 4]`.

        All frames of a clip are decoded together.
        """
        return self.decoder(latents)

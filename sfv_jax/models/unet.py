"""The UNet of Stable Video Diffusion (diffusers UNetSpatioTemporalConditionModel), exact up to fp32 rounding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sfv_jax.errors import UserError
from sfv_jax.models.attention import TransformerSpatioTemporal
from sfv_jax.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    SpatioTemporalResBlock,
    TimestepEmbedding,
    Upsample,
    remat,
    sinusoidal_embedding,
)
from sfv_jax.models.partitioning import rows

Array = jax.Array


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; field names follow diffusers' `unet/config.json` where it has them.

    The last level has no attention; the others have one transformer per resnet. `num_frames` does not change the
    network: it is the clip length in training (14 for SVD, 25 for SVD-XT) and the sampler's default.
    `resnet_eps` applies to the resnets of attention levels and of all up blocks, `mid_eps` to those of the last down
    block and the middle. Both are diffusers' values; SVD's training code used 1e-5 throughout.

    Raises:
      UserError: if the sizes contradict each other.
    """

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    num_frames: int = 14
    sample_size: int = 96
    norm_groups: int = 32
    resnet_eps: float = 1e-6
    mid_eps: float = 1e-5
    temporal_conv: str = "auto"
    attention_kernel: str = "auto"
    remat: bool = False

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if len(self.num_attention_heads) != levels:
            raise UserError(
                f"num_attention_heads has {len(self.num_attention_heads)} entries for {levels} block_out_channels"
            )
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            if channels % heads or channels % self.norm_groups:
                raise UserError(f"{channels} channels must divide by {heads} heads and by {self.norm_groups} groups")

    @classmethod
    def svd(cls, **changes) -> "UNetConfig":
        """Returns stable-video-diffusion-img2vid: 14 frames, 1,524,623,082 parameters."""
        return cls(**changes)

    @classmethod
    def svd_xt(cls, **changes) -> "UNetConfig":
        """Returns stable-video-diffusion-img2vid-xt: the same tensors, 25 frames."""
        sizes: dict[str, Any] = {"num_frames": 25}
        return cls(**sizes | changes)

    @classmethod
    def tiny(cls, **changes) -> "UNetConfig":
        """Returns two levels of the same classes, for tests on CPU."""
        sizes: dict[str, Any] = dict(
            block_out_channels=(32, 64),
            num_attention_heads=(2, 4),
            layers_per_block=1,
            cross_attention_dim=32,
            addition_time_embed_dim=16,
            num_frames=4,
            sample_size=8,
            temporal_conv="matmul",
        )
        return cls(**sizes | changes)

    @property
    def emb_channels(self) -> int:
        """Width of the embedding of noise level and ids."""
        return 4 * self.block_out_channels[0]


class DownBlock(nnx.Module):
    """Resnets, each followed by a transformer if `heads` is given, then the downsampler."""

    def __init__(self, config: UNetConfig, i: int, o: int, *, heads: int | None, eps: float, downsample: bool, **kw):
        common: dict[str, Any] = dict(groups=config.norm_groups, **kw)
        self.resnets = nnx.List(
            SpatioTemporalResBlock(
                i if n == 0 else o, o, temb_channels=config.emb_channels, eps=eps, form=config.temporal_conv, **common
            )
            for n in range(config.layers_per_block)
        )
        self.attentions = transformers(config, o, heads, config.layers_per_block, **common)
        self.downsamplers = nnx.List([Downsample(o, padding=1, **kw)]) if downsample else None
        self.remat = config.remat

    def __call__(self, x: Array, emb: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for n, resnet in enumerate(self.resnets):
            x = remat(resnet, self.remat)(x, emb)
            if self.attentions is not None:
                x = self.attentions[n](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet."""

    def __init__(self, config: UNetConfig, channels: int, *, heads: int, **kw):
        common: dict[str, Any] = dict(groups=config.norm_groups, **kw)
        resnet: dict[str, Any] = dict(temb_channels=config.emb_channels, eps=config.mid_eps, form=config.temporal_conv)
        self.resnets = nnx.List(SpatioTemporalResBlock(channels, channels, **resnet, **common) for _ in range(2))
        self.attentions = transformers(config, channels, heads, 1, **common)
        self.remat = config.remat

    def __call__(self, x: Array, emb: Array, context: Array) -> Array:
        x = remat(self.resnets[0], self.remat)(x, emb)
        # pyrefly: ignore[unsupported-operation]  # the middle always has heads
        return remat(self.resnets[1], self.remat)(self.attentions[0](x, context), emb)


class UpBlock(nnx.Module):
    """Resnets on [hidden, skip], each followed by a transformer if `heads` is given, then the upsampler."""

    def __init__(self, config: UNetConfig, inputs: list[int], o: int, *, heads: int | None, upsample: bool, **kw):
        common: dict[str, Any] = dict(groups=config.norm_groups, **kw)
        resnet: dict[str, Any] = dict(
            temb_channels=config.emb_channels, eps=config.resnet_eps, form=config.temporal_conv
        )
        self.resnets = nnx.List(SpatioTemporalResBlock(i, o, **resnet, **common) for i in inputs)
        self.attentions = transformers(config, o, heads, len(inputs), **common)
        self.upsamplers = nnx.List([Upsample(o, **kw)]) if upsample else None
        self.remat = config.remat

    def __call__(self, x: Array, skips: list[Array], emb: Array, context: Array) -> Array:
        """Pops one skip per resnet from the end of `skips`; upsamples to the size of the last one that remains."""
        for n, resnet in enumerate(self.resnets):
            x = remat(resnet, self.remat)(jnp.concatenate([x, skips.pop()], axis=-1), emb)
            if self.attentions is not None:
                x = self.attentions[n](x, context)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, skips[-1].shape[-3:-1])
        return x


def transformers(config: UNetConfig, channels: int, heads: int | None, count: int, **kw) -> nnx.List | None:
    """Returns `count` transformers of `channels`, or None without `heads`."""
    if heads is None:
        return None
    return nnx.List(
        TransformerSpatioTemporal(
            channels, heads, config.cross_attention_dim, kernel=config.attention_kernel, remat=config.remat, **kw
        )
        for _ in range(count)
    )


class UNet(nnx.Module):
    """F_theta of Eq. 2: the raw v-prediction of SVD's denoiser.

    `encoder_only=True` builds the half that is the discriminator's backbone: `conv_in`, the two embeddings and the down
    blocks. Its parameter tree is a subtree of the full one, so the same converted weights fill both.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
        encoder_only: bool = False,
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        heads = [*config.num_attention_heads[:-1], None]
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1, **kw)
        self.time_embedding = TimestepEmbedding(channels[0], config.emb_channels, **kw)
        self.add_embedding = TimestepEmbedding(3 * config.addition_time_embed_dim, config.emb_channels, **kw)
        self.down_blocks = nnx.List(
            DownBlock(
                config,
                channels[max(n - 1, 0)],
                channels[n],
                heads=heads[n],
                eps=config.mid_eps if n == levels - 1 else config.resnet_eps,
                downsample=n < levels - 1,
                **kw,
            )
            for n in range(levels)
        )
        self.config, self.dtype = config, dtype
        if encoder_only:
            return
        self.mid_block = MidBlock(config, channels[-1], heads=config.num_attention_heads[-1], **kw)
        up, skips = channels[::-1], skip_channels(config)
        blocks = []
        for n in range(levels):
            previous = up[max(n - 1, 0)]
            inputs = [(previous if j == 0 else up[n]) + skips.pop() for j in range(config.layers_per_block + 1)]
            blocks.append(UpBlock(config, inputs, up[n], heads=heads[::-1][n], upsample=n < levels - 1, **kw))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(channels[0], groups=config.norm_groups, eps=1e-5, per_frame=True, **kw)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1, **kw)

    def embed(self, c_noise: Array, ids: Array) -> Array:
        """Returns the embedding `[b, 4 * channels[0]]` of `c_noise [b]` and `ids [b, 3]`, as in `__call__`."""
        time = sinusoidal_embedding(c_noise, self.config.block_out_channels[0]).astype(self.dtype)
        added = sinusoidal_embedding(ids, self.config.addition_time_embed_dim).astype(self.dtype)
        return self.time_embedding(time) + self.add_embedding(rearrange(added, "b n d -> b (n d)"))

    def _down(self, x: Array, c_noise: Array, context: Array, ids: Array):
        if x.shape[-1] != self.config.in_channels:
            raise ValueError(f"UNet input has {x.shape[-1]} channels, but its config has {self.config.in_channels}")
        emb, context = self.embed(c_noise, ids), context.astype(self.dtype)
        x = rows(self.conv_in(rows(x)))
        outputs, skips = [], [x]
        for block in self.down_blocks:
            x, pushed = block(x, emb, context)
            outputs.append(x)
            skips += pushed
        return x, outputs, skips, emb, context

    def encode(self, x: Array, c_noise: Array, context: Array, ids: Array) -> list[Array]:
        """Returns SF-V's features: the outputs `[b, t, h_n, w_n, c_n]` of all down blocks, after their downsamplers."""
        return self._down(x, c_noise, context, ids)[1]

    def __call__(self, x: Array, c_noise: Array, context: Array, ids: Array) -> Array:
        """Returns the raw output `[b, t, h, w, out_channels]`.

        Args:
          x: `[b, t, h, w, in_channels]`, the scaled noisy latents and the conditioning latent on the channel axis.
          c_noise: `[b]`, 0.25 ln sigma.
          context: `[b, d]`, the CLIP image embedding, which is the only cross-attention token.
          ids: `[b, 3]`, fps - 1, motion bucket id, noise augmentation strength.
        """
        x, _, skips, emb, context = self._down(x, c_noise, context, ids)
        x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = block(x, skips, emb, context)
        return rows(self.conv_out(nnx.silu(self.conv_norm_out(x))))


def skip_channels(config: UNetConfig) -> list[int]:
    """Returns the channels of the skip tensors, in the order in which they are pushed."""
    channels = config.block_out_channels
    skips = [channels[0]]
    for n, c in enumerate(channels):
        skips += [c] * (config.layers_per_block + (n < len(channels) - 1))
    return skips

"""SF-V's discriminator heads (paper Fig. 3; head design after StyleGAN-T / Projected GAN).

The discriminator is `UNet(..., encoder_only=True)`, frozen, followed by `DiscriminatorHeads` on its features: at each
level one spatial head (each frame separately) and one temporal head (each position along time). Only heads are trained.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sfv_jax.errors import UserError
from sfv_jax.models.layers import Conv2d, GroupNorm, Linear, TemporalConv, sinusoidal_embedding
from sfv_jax.models.partitioning import rows
from sfv_jax.models.unet import UNetConfig

Array = jax.Array


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the heads. The paper does not state the kernels, the width of the projection and the norm.

    With spatial kernel 3 and temporal kernel 9 the eight heads of SVD have about 77 M parameters. The norm is GroupNorm
    within the sample, so that logits depend neither on the batch nor on the device mesh (StyleGAN-T uses statistics of
    virtual batches). `spatial` and `temporal` switch the two kinds of heads on; Table 2 is the ablation.

    Raises:
      UserError: if both kinds are off, or a kernel is even.
    """

    feature_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    embed_dim: int = 1024
    spatial_kernel: int = 3
    temporal_kernel: int = 9
    projection_dim: int = 64
    sinusoid_dim: int = 256
    norm_groups: int = 32
    spatial: bool = True
    temporal: bool = True
    temporal_conv: str = "auto"

    def __post_init__(self):
        if not (self.spatial or self.temporal):
            raise UserError("a discriminator needs spatial heads, temporal heads, or both")
        for name in ("spatial_kernel", "temporal_kernel"):
            if getattr(self, name) % 2 == 0:
                raise UserError(f"{name} must be odd, got {getattr(self, name)}")

    @classmethod
    def for_unet(cls, unet: UNetConfig, **changes) -> "DiscriminatorConfig":
        """Returns heads that fit the encoder of `unet`."""
        sizes: dict[str, Any] = dict(
            feature_channels=unet.block_out_channels,
            embed_dim=unet.cross_attention_dim,
            norm_groups=unet.norm_groups,
            temporal_conv=unet.temporal_conv,
        )
        return cls(**sizes | changes)

    @classmethod
    def svd(cls, **changes) -> "DiscriminatorConfig":
        """Returns heads for SVD's (and SVD-XT's) encoder."""
        return cls.for_unet(UNetConfig.svd(), **changes)

    svd_xt = svd

    @classmethod
    def tiny(cls, **changes) -> "DiscriminatorConfig":
        """Returns heads for the tiny encoder."""
        return cls.for_unet(UNetConfig.tiny(), **dict(projection_dim=16, sinusoid_dim=32, temporal_kernel=5) | changes)


class Projection(nnx.Module):
    """Affine map from the condition C (image embedding, noise level, frame index) to one vector per frame."""

    def __init__(self, config: DiscriminatorConfig, **kw):
        self.image = Linear(config.embed_dim, config.projection_dim, **kw)
        self.noise = Linear(config.sinusoid_dim, config.projection_dim, use_bias=False, **kw)
        self.frame = Linear(config.sinusoid_dim, config.projection_dim, use_bias=False, **kw)
        self.dim = config.sinusoid_dim

    def __call__(self, image_embed: Array, c_noise: Array, num_frames: int) -> Array:
        """Returns `[b, t, projection_dim]` from `image_embed [b, d]` and `c_noise [b]`."""
        sample = self.image(image_embed) + self.noise(sinusoidal_embedding(c_noise, self.dim))
        frame = self.frame(sinusoidal_embedding(jnp.arange(num_frames), self.dim))
        return sample[:, None] + frame


class Head(nnx.Module):
    """Conv, residual block, conv, inner product with the projected condition: `[b, t, h, w, c] -> [b, t, h, w]`.

    `temporal` heads convolve along time and normalize over all frames; spatial heads process one frame at a time.
    """

    def __init__(self, config: DiscriminatorConfig, channels: int, *, temporal: bool, **kw):
        def conv(o: int, kernel: int):
            if temporal:
                return TemporalConv(channels, o, kernel, form=config.temporal_conv, **kw)
            return Conv2d(channels, o, kernel, padding=kernel // 2, **kw)

        norm = dict(groups=config.norm_groups, eps=1e-5, per_frame=not temporal)
        self.conv_in = conv(channels, 1)
        self.norm_in = GroupNorm(channels, **norm, **kw)
        self.conv_res = conv(channels, config.temporal_kernel if temporal else config.spatial_kernel)
        self.norm_res = GroupNorm(channels, **norm, **kw)
        self.conv_out = conv(config.projection_dim, 1)
        self.projection = Projection(config, **kw)
        self.scale = 1 / math.sqrt(config.projection_dim)

    def __call__(self, features: Array, image_embed: Array, c_noise: Array) -> Array:
        x = rows(nnx.leaky_relu(self.norm_in(self.conv_in(rows(features))), 0.2))
        x = rows(x + nnx.leaky_relu(self.norm_res(self.conv_res(x)), 0.2)) / math.sqrt(2)
        condition = self.projection(image_embed, c_noise, features.shape[1])
        product = self.conv_out(x).astype(jnp.float32) * rearrange(condition, "b t d -> b t 1 1 d").astype(jnp.float32)
        return jnp.sum(product, axis=-1) * self.scale


class DiscriminatorHeads(nnx.Module):
    """All heads; each returns one fp32 logit map, in the order of `head_names`."""

    def __init__(self, config: DiscriminatorConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kinds = [kind for kind in ("spatial", "temporal") if getattr(config, kind)]
        for kind in kinds:
            heads = nnx.List(Head(config, c, temporal=kind == "temporal", **kw) for c in config.feature_channels)
            setattr(self, kind, heads)
        self.config, self.kinds = config, kinds

    def __call__(self, features: list[Array], image_embed: Array, c_noise: Array) -> list[Array]:
        """Returns logit maps `[b, t, h_n, w_n]`, spatial heads first.

        Args:
          features: `[b, t, h_n, w_n, c_n]` per head: the levels that `UNet.encode` returns, repeated by `per_head`.
          image_embed: `[b, d]`, the CLIP embedding of the condition image.
          c_noise: `[b]`, 0.25 ln sigma' of the re-noised latents from which the features were computed.
        """
        heads = [head for kind in self.kinds for head in getattr(self, kind)]
        return [head(x, image_embed, c_noise) for head, x in zip(heads, features, strict=True)]


def per_head(config: DiscriminatorConfig, features: list[Array]) -> list[Array]:
    """Returns the features of all levels, repeated for each kind of head: one entry per head."""
    return features * (config.spatial + config.temporal)


def head_names(config: DiscriminatorConfig) -> list[str]:
    """Returns `["spatial_0", ..., "temporal_3"]`, in the order of the logit maps."""
    kinds = [kind for kind in ("spatial", "temporal") if getattr(config, kind)]
    return [f"{kind}_{n}" for kind in kinds for n in range(len(config.feature_channels))]

"""The CLIP ViT-H/14 image tower (transformers CLIPVisionModelWithProjection) and SVD's preprocessing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sfv_jax.models import tree
from sfv_jax.models.attention import einsum_attention
from sfv_jax.models.layers import Conv2d, LayerNorm, Linear

Array = jax.Array
# From CLIP's preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the vision tower; field names follow transformers' `image_encoder/config.json`."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    projection_dim: int = 1024

    @classmethod
    def svd(cls, **changes) -> "CLIPConfig":
        """Returns ViT-H/14 as in SVD and SVD-XT: 632,076,800 parameters."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes) -> "CLIPConfig":
        """Returns two narrow layers on 28-pixel patches, for tests on CPU."""
        sizes: dict[str, Any] = dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=28,
            projection_dim=32,
        )
        return cls(**sizes | changes)


class SelfAttention(nnx.Module):
    """Multi-head self-attention over tokens `[n, s, c]` (transformers CLIPAttention)."""

    def __init__(self, config: CLIPConfig, **kw):
        d = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d, d, **kw) for _ in range(4))
        self.heads = config.num_attention_heads

    def __call__(self, x: Array) -> Array:
        q, k, v = (
            rearrange(project(x), "n s (heads d) -> n s heads d", heads=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(einsum_attention(q, k, v), "n s heads d -> n s (heads d)"))


class MLP(nnx.Module):
    """Linear, exact GELU, Linear (transformers CLIPMLP)."""

    def __init__(self, config: CLIPConfig, **kw):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Array) -> Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class EncoderLayer(nnx.Module):
    """Pre-norm self-attention and MLP, each with a residual (transformers CLIPEncoderLayer)."""

    def __init__(self, config: CLIPConfig, **kw):
        self.layer_norm1 = LayerNorm(config.hidden_size, **kw)
        self.self_attn = SelfAttention(config, **kw)
        self.layer_norm2 = LayerNorm(config.hidden_size, **kw)
        self.mlp = MLP(config, **kw)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    """Tokens `[b, 1 + patches, c]` of images `[b, h, w, 3]`, class token first (transformers CLIPVisionEmbeddings)."""

    def __init__(self, config: CLIPConfig, *, dtype, param_dtype, rngs):
        d, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.class_embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (d,), param_dtype))
        self.patch_embedding = Conv2d(3, d, config.patch_size, stride=config.patch_size, use_bias=False, **kw)
        self.position_embedding = nnx.Embed(patches + 1, d, **kw)

    def __call__(self, images: Array) -> Array:
        patches = rearrange(self.patch_embedding(images), "b h w d -> b (h w) d")
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (len(images), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding.embedding[...].astype(patches.dtype)


class Layers(nnx.Module):
    """Stack of encoder layers (transformers CLIPEncoder)."""

    def __init__(self, config: CLIPConfig, **kw):
        self.layers = nnx.List(EncoderLayer(config, **kw) for _ in range(config.num_hidden_layers))

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTransformer(nnx.Module):
    """Class token after the last layer and its norm: `[b, 224, 224, 3] -> [b, hidden_size]`."""

    def __init__(self, config: CLIPConfig, **kw):
        self.embeddings = Embeddings(config, **kw)
        self.pre_layrnorm = LayerNorm(config.hidden_size, **kw)  # sic, as in transformers
        self.encoder = Layers(config, **kw)
        self.post_layernorm = LayerNorm(config.hidden_size, **kw)

    def __call__(self, images: Array) -> Array:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(images)))[:, 0])


class CLIPVision(nnx.Module):
    """Image embedding `[b, projection_dim]`, not L2-normalized, of preprocessed images `[b, 224, 224, 3]`."""

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.vision_model = VisionTransformer(config, **kw)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, **kw)
        self.config = config

    def __call__(self, images: Array) -> Array:
        return self.visual_projection(self.vision_model(images))


@lru_cache(maxsize=16)
def resize_matrix(n: int, m: int = 224) -> np.ndarray:
    """Returns the matrix `[m, n]`, float32, that resizes one axis from n to m pixels as diffusers does.

    It equals `_resize_with_antialiasing`: a Gaussian blur with reflected borders whose width follows the scale, then
    bicubic interpolation (a = -0.75) with align_corners. No mode of `jax.image.resize` agrees with it.
    """
    sigma = max((n / m - 1.0) / 2.0, 0.001)
    taps = int(max(4.0 * sigma, 3.0))
    taps += 1 - taps % 2
    offsets = np.arange(taps) - taps // 2
    weights = np.exp(-(offsets**2) / (2.0 * sigma**2))
    blur = np.zeros((n, n))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        source = np.abs(np.arange(n) + offset)  # reflection without repeating the border pixel
        source = (n - 1) - np.abs((n - 1) - source)
        np.add.at(blur, (np.arange(n), source), weight)

    position = np.arange(m) * (n - 1) / (m - 1)
    base = np.floor(position).astype(int)
    cubic = np.zeros((m, n))
    for tap in range(-1, 3):
        distance = np.abs(position - (base + tap))
        inner = (1.25 * distance - 2.25) * distance**2 + 1
        outer = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        np.add.at(cubic, (np.arange(m), np.clip(base + tap, 0, n - 1)), np.where(distance <= 1, inner, outer))
    return (cubic @ blur).astype(np.float32)


def preprocess(images: Array, size: int = 224) -> Array:
    """Returns CLIP's input `[b, size, size, 3]` from `images [b, h, w, 3]` in [0, 1] (StableVideoDiffusionPipeline).

    The aspect ratio is not kept, nothing is cropped, and overshoots of the resize are not clipped. The resize is linear
    and preserves constants, so resizing in [0, 1] equals the reference's detour through [-1, 1].
    """
    rows, cols = resize_matrix(images.shape[1], size), resize_matrix(images.shape[2], size)
    resized = jnp.einsum("mh,bhwc,nw->bmnc", rows, images.astype(jnp.float32), cols, precision="highest")
    return (resized - jnp.asarray(MEAN)) / jnp.asarray(STD)


def embedder(config: CLIPConfig) -> Callable[[tree.Params, Array | np.ndarray], Array]:
    """Returns the function by which SVD embeds conditions: `(params, images)` to fp32 `[b, d]`, not normalized.

    `images` are uint8 `[b, h, w, 3]` of any size. The resize is a program of its own, so that the tower is compiled for
    one size only.
    """
    graph, _ = tree.abstract(CLIPVision, config)
    prepare = jax.jit(lambda images: preprocess(jnp.asarray(images).astype(jnp.float32) / 255.0, config.image_size))
    tower = jax.jit(lambda params, images: tree.build(graph, params)(images))
    return lambda params, images: tower(params, prepare(images))

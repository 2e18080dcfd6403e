"""Building blocks shared by the UNet, the VAE and the discriminator.

Shapes are channels last, `[b, t, h, w, c]`. Attribute names are those of diffusers, so that a parameter path *is* a
diffusers key up to the leaf (`kernel`/`scale`/`embedding` against `weight`). Every layer takes `dtype` (compute) and
`param_dtype` (storage); normalisation statistics, sinusoids and mixing factors are fp32 whatever `dtype` is.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax import lax

from sfv_jax.errors import UserError
from sfv_jax.models.partitioning import BATCH, axis_size, gathered, platform, promote, rows, shared_axis

Array = jax.Array

kernel_init = nnx.initializers.lecun_normal()


def matmul(x: Array, kernel: Array, *_, **settings) -> Array:
    """`x [..., i] @ kernel [i, o]`, with the `settings` of lax.dot_general; Linear takes it for its `dot_general`.

    On CPU without a mesh of several devices a product of two matrices: where rows have more axes than one, XLA makes
    transposed copies of the activations for the gradient of the kernel. On a mesh those axes may be in parts.
    """
    matrix = platform() == "cpu" and axis_size(*BATCH, "spatial") == 1
    lhs = x.reshape(-1, x.shape[-1]) if matrix else x
    y = lax.dot_general(lhs, kernel, (((lhs.ndim - 1,), (0,)), ((), ())), **settings)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


Linear = partial(nnx.Linear, promote_dtype=promote, dot_general=matmul)
# Flax defaults (fast variance, eps 1e-6) match neither diffusers nor fp32 accuracy: two passes, and eps always named.
LayerNorm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def fp32(x: Array) -> Array:
    """`x` in fp32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class GroupNorm(nnx.Module):
    """GroupNorm over all axes but the first and the channel, fp32 two-pass statistics (torch.nn.GroupNorm).

    `x [b, t, h, w, c]` is normalised per sample, jointly over t, h, w; with `per_frame=True` per frame.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, per_frame: bool, dtype, param_dtype, rngs):
        del rngs  # deterministic initialisation; kept so that every layer is built alike
        if channels % groups:
            raise UserError(f"GroupNorm: {channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.groups, self.eps, self.per_frame, self.dtype = groups, eps, per_frame, dtype

    def __call__(self, x: Array) -> Array:
        return self.normalise(x, *self.statistics(x))

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """Mean and variance of every channel's group, fp32 `[b, t, 1, 1, c]`; `[b, 1, 1, 1, c]` over all frames.

        Channels are reduced by themselves and their results by groups: splitting the channel axis of `x` would move it
        through memory on TPU.
        """
        axes = (2, 3) if self.per_frame else (1, 2, 3)
        y = fp32(x)
        mean = self._over_groups(jnp.mean(y, axes, keepdims=True))
        return mean, self._over_groups(jnp.mean(jnp.square(y - mean), axes, keepdims=True))

    def normalise(self, x: Array, mean: Array, var: Array) -> Array:
        """`x [b, t, h, w, c]` with these statistics, scaled and shifted, in the compute dtype."""
        y = (fp32(x) - mean) * (lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)

    def _over_groups(self, x: Array) -> Array:
        """The mean over its group for every channel of `x [b, t, 1, 1, c]`."""
        n = x.shape[-1] // self.groups
        if platform() == "tpu":  # two small products; splitting the channel axis and joining it again are four copies
            member = (jnp.arange(x.shape[-1])[:, None] // n == jnp.arange(self.groups)).astype(x.dtype)
            product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
            return product("...g,cg->...c", product("...c,cg->...g", x, member) / n, member)
        groups = rearrange(x, "b t 1 1 (g n) -> b t g n", g=self.groups).mean(-1)
        return repeat(groups, "b t g -> b t 1 1 (g n)", n=n)


class Conv2d(nnx.Module):
    """2-D convolution of every frame: `[..., h, w, i] -> [..., h', w', o]` (torch.nn.Conv2d).

    `padding` is symmetric, as in torch; `((top, bottom), (left, right))` for anything else. JAX's "SAME" differs from
    it at stride 2 and is never used.
    """

    def __init__(
        self, i: int, o: int, kernel_size: int, *, stride=1, padding=0, use_bias=True, dtype, param_dtype, rngs
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, kernel_size, i, o), param_dtype))
        self.bias = nnx.Param(jnp.zeros((o,), param_dtype)) if use_bias else None
        self.padding = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        self.stride, self.dtype = (stride, stride), dtype

    def __call__(self, x: Array) -> Array:
        frames = x.reshape(-1, *x.shape[-3:]).astype(self.dtype)
        kernel = gathered(self.kernel[...], self.dtype)
        y = self.biased(self._form(frames.shape)(frames, kernel))
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def _form(self, shape: tuple[int, ...]) -> Callable[[Array, Array], Array]:
        """How to convolve frames of this shape `[n, h, w, i]`: on CPU, where it is faster, by matrix products."""
        _, h, w, i = shape
        sizes = self.kernel.shape[:2], self.padding, self.stride
        if platform() == "cpu" and sizes == ((1, 1), ((0, 0), (0, 0)), (1, 1)):
            return lambda x, kernel: matmul(x, kernel[0, 0])
        if platform() == "cpu" and sizes == ((3, 3), ((1, 1), (1, 1)), (1, 1)) and h * w <= 32 and i >= 256:
            return conv3x3_by_matmul
        return partial(conv2d, padding=self.padding, strides=self.stride)

    def biased(self, y: Array) -> Array:
        """`y [..., o]` with the bias, if there is one."""
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def conv2d(x: Array, kernel: Array, padding, *, strides=(1, 1), lhs_dilation=(1, 1)) -> Array:
    """`x [n, h, w, i]`, `kernel [k, l, i, o]` -> `[n, h', w', o]`."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation=lhs_dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv3x3_by_matmul(x: Array, kernel: Array) -> Array:
    """`conv2d` of `x [n, h, w, i]` with one row and column of zeros around it, as one matrix product.

    For few pixels and many channels, where XLA's convolution on CPU takes tens of times as long.
    """
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, j : j + h, k : k + w] for j in range(3) for k in range(3)], axis=-1)
    return matmul(taps, rearrange(kernel, "j k i o -> (j k i) o"))


class TemporalConv(nnx.Module):
    """Convolution of odd length k along time, zero padded: `[b, t, h, w, i] -> [b, t, h, w, o]` (torch Conv3d, kx1x1).

    `form="conv"` is one convolution, the right choice on accelerators: 3-D on TPU, on GPU 2-D over time and all pixels,
    because XLA moves the channels first for a 3-D one there. `form="matmul"`, for CPU, adds up the shifted products of
    every tap: about twice as fast as XLA's 3-D convolution, and nothing but `x` is held for the gradient.
    """

    def __init__(self, i: int, o: int, kernel_size: int = 3, *, form: str = "conv", dtype, param_dtype, rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, 1, 1, i, o), param_dtype))
        self.bias = nnx.Param(jnp.zeros((o,), param_dtype))
        if form not in ("conv", "matmul"):
            raise UserError(f"temporal convolution form {form!r}: choose 'conv' or 'matmul'")
        self.form, self.dtype = form, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), gathered(self.kernel[...], self.dtype)
        k, (t, h, w) = kernel.shape[0], x.shape[1:4]
        pad = (k // 2, k // 2)
        if self.form == "conv" and platform() == "gpu" and shared_axis(h, w) != 3:
            y = conv2d(rearrange(x, "b t h w i -> b t (h w) i"), kernel[:, :, 0], (pad, (0, 0)))
            y = rearrange(y, "b t (h w) o -> b t h w o", h=h)
        elif self.form == "conv":
            y = lax.conv_general_dilated(
                x, kernel, (1, 1, 1), (pad, (0, 0), (0, 0)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            )
        else:
            products = (jnp.pad(matmul(x, tap[0, 0]), ((0, 0), pad, *((0, 0),) * 3)) for tap in kernel)
            y = sum(y[:, j : j + t] for j, y in enumerate(products))
        return y + self.bias[...].astype(self.dtype)


def sinusoidal_embedding(x: Array, dim: int) -> Array:
    """Sinusoids `[..., dim]` of `x [...]`, fp32, cosines first (diffusers Timesteps, flip_sin_to_cos, shift 0)."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(dim // 2, dtype=np.float32) / (dim // 2)).astype(np.float32)
    angles = jnp.asarray(x, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear on a sinusoid (diffusers TimestepEmbedding)."""

    def __init__(self, i: int, hidden: int, o: int | None = None, **kw):
        self.linear_1 = Linear(i, hidden, **kw)
        self.linear_2 = Linear(hidden, o or hidden, **kw)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """Two normalised convolutions and a shortcut; `temporal` swaps 3x3 for 3x1x1 and per-frame norms for joint ones.

    References: diffusers ResnetBlock2D and TemporalResnetBlock. `emb [b, d]` is added between the convolutions when
    `temb_channels` is given.
    """

    def __init__(
        self, i: int, o: int, *, temb_channels: int | None, groups: int, eps: float, temporal=False, form="conv", **kw
    ):
        norm = partial(GroupNorm, groups=groups, eps=eps, per_frame=not temporal, **kw)
        conv = partial(TemporalConv, form=form, **kw) if temporal else partial(Conv2d, kernel_size=3, padding=1, **kw)
        self.norm1 = norm(i)
        self.conv1 = conv(i, o)
        self.time_emb_proj = Linear(temb_channels, o, **kw) if temb_channels else None
        self.norm2 = norm(o)
        self.conv2 = conv(o, o)
        self.conv_shortcut = Conv2d(i, o, 1, **kw) if i != o else None

    def __call__(self, x: Array, emb: Array | None = None) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + rearrange(self.time_emb_proj(nnx.silu(emb)), "b c -> b 1 1 1 c")
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AlphaBlender(nnx.Module):
    """Learned mix of the spatial and the temporal branch (diffusers AlphaBlender).

    a = sigmoid(mix_factor) weights the spatial branch in the UNet; `switch=True` (VAE decoder) gives it 1 - a.
    """

    def __init__(self, alpha: float, *, switch: bool = False, dtype, param_dtype, rngs):
        del rngs
        self.mix_factor = nnx.Param(jnp.full((1,), alpha, param_dtype))
        self.switch, self.dtype = switch, dtype

    def __call__(self, spatial: Array, temporal: Array) -> Array:
        alpha = nnx.sigmoid(self.mix_factor[...]).astype(self.dtype)
        alpha = 1 - alpha if self.switch else alpha
        return alpha * spatial + (1 - alpha) * temporal


class SpatioTemporalResBlock(nnx.Module):
    """Spatial resnet, then a temporal resnet on its output, mixed (diffusers SpatioTemporalResBlock)."""

    def __init__(
        self,
        i: int,
        o: int,
        *,
        temb_channels: int | None,
        groups: int,
        eps: float,
        temporal_eps: float | None = None,
        alpha: float = 0.5,
        switch: bool = False,
        form: str = "conv",
        **kw,
    ):
        self.spatial_res_block = ResnetBlock(i, o, temb_channels=temb_channels, groups=groups, eps=eps, **kw)
        self.temporal_res_block = ResnetBlock(
            o, o, temb_channels=temb_channels, groups=groups, eps=temporal_eps or eps, temporal=True, form=form, **kw
        )
        self.time_mixer = AlphaBlender(alpha, switch=switch, **kw)

    def __call__(self, x: Array, emb: Array | None = None) -> Array:
        return self.mix(self.spatial_res_block(x, emb), emb)

    def mix(self, spatial: Array, emb: Array | None = None) -> Array:
        """The temporal resnet on the output of the spatial one, and their mixture."""
        return rows(self.time_mixer(spatial, self.temporal_res_block(spatial, emb)))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2; `padding` as in Conv2d (symmetric in the UNet, right/bottom in the VAE)."""

    def __init__(self, channels: int, *, padding, **kw):
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding, **kw)

    def __call__(self, x: Array) -> Array:
        size = x.shape[-3:-1]
        half = tuple(-(-n // 2) for n in size)
        return rows(rows(self.conv(rows(x, half)), size))


class Upsample(nnx.Module):
    """Nearest resize to twice the size, or to `size (h, w)`, then a 3x3 convolution (diffusers Upsample2D).

    Twice the size is computed from the small frame with 4/9 of the products, see `doubled`.
    """

    def __init__(self, channels: int, **kw):
        self.conv = Conv2d(channels, channels, 3, padding=1, **kw)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        h, w = x.shape[-3:-1]
        size = size or (2 * h, 2 * w)
        x = rows(x, size)
        if size == (2 * h, 2 * w):
            frames = x.reshape(-1, h, w, x.shape[-1]).astype(self.conv.dtype)
            kernel = gathered(merged_taps(self.conv.kernel[...]), self.conv.dtype)
            y = self.conv.biased(doubled(frames, kernel))
            y = y.reshape(*x.shape[:-3], *y.shape[1:])
        else:
            down, across = (np.arange(n) * m // n for n, m in zip(size, (h, w), strict=True))
            y = self.conv(x[..., down, :, :][..., across, :])
        return rows(rows(y, (h, w)))


def merged_taps(kernel: Array) -> Array:
    """The kernel `[4, 4, i, o]` that does to spread pixels what `kernel [3, 3, i, o]` does to doubled ones.

    Along an axis the three taps (a, b, c) become (a, a + b, b + c, c): two neighbours of a doubled axis are equal.
    Summed in fp32 at least, so that rounding to the compute dtype comes once, after it.
    """
    kernel = fp32(kernel)
    for axis in (0, 1):
        first, last = ([(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((0, 1), (1, 0)))
        kernel = jnp.pad(kernel, first) + jnp.pad(kernel, last)
    return kernel


def doubled(x: Array, kernel: Array) -> Array:
    """Nearest resize of `x [n, h, w, i]` to `[n, 2h, 2w, i]` and a padded 3x3 convolution, by its `merged_taps`.

    On TPU a transposed convolution, elsewhere one 2x2 convolution for each parity of row and column: GPUs run
    dilated inputs at their full cost, and CPUs the gradient of them many times over.
    """
    if platform() == "tpu":
        return conv2d(x, kernel, ((2, 2), (2, 2)), lhs_dilation=(2, 2))
    parities = [
        [conv2d(x, kernel[p::2, q::2], ((1 - p, p), (1 - q, q))) for q in (0, 1)] for p in (0, 1)
    ]  # rows 2 n + p, columns 2 m + q
    y = jnp.stack([jnp.stack(row, axis=3) for row in parities], axis=2)
    return rearrange(y, "n h p w q o -> n (h p) (w q) o")


def remat(fn: Callable, enabled: bool) -> Callable:
    """`fn`, recomputed in the backward pass when `enabled` (jax.checkpoint)."""
    return jax.checkpoint(fn) if enabled else fn

"""Building blocks shared by the UNet, the VAE and the discriminator.

Shapes are channels last, `[b, t, h, w, c]`. Attribute names are those of diffusers, so that a parameter path equals a
diffusers key up to the leaf (`kernel`/`scale`/`embedding` instead of `weight`). Every layer takes `dtype` (compute) and
`param_dtype` (storage); normalization statistics, sinusoids and mixing factors are fp32 whatever `dtype` is.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax import lax

from sfv_jax.choices import TEMPORAL_CONVS
from sfv_jax.errors import UserError
from sfv_jax.models.partitioning import BATCH, axis_size, gathered, platform, promote, rows, shared_axis

Array = jax.Array

kernel_init = nnx.initializers.lecun_normal()


def on_one_cpu() -> bool:
    """Returns whether activations are whole on one CPU device: no mesh axis shares them."""
    return platform() == "cpu" and axis_size(*BATCH, "spatial") == 1


def matmul(x: Array, kernel: Array, *_, **settings) -> Array:
    """Computes `x [..., i] @ kernel [i, o]`; Linear calls it in place of lax.dot_general, with its `settings`.

    On CPU, unless several devices share the axes of `x`, these axes are merged into one: with more than one, XLA makes
    transposed copies of the activations for the gradient of the kernel.
    """
    lhs = x.reshape(-1, x.shape[-1]) if on_one_cpu() else x
    y = lax.dot_general(lhs, kernel, (((lhs.ndim - 1,), (0,)), ((), ())), **settings)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


Linear = partial(nnx.Linear, promote_dtype=promote, dot_general=matmul)
# Flax's defaults (fast variance, eps 1e-6) match neither diffusers nor fp32 accuracy, so both are always given.
LayerNorm = partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def fp32(x: Array) -> Array:
    """Returns `x` in fp32, or unchanged if its dtype is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class GroupNorm(nnx.Module):
    """GroupNorm with two-pass statistics in fp32 (torch.nn.GroupNorm).

    `x [b, t, h, w, c]` is normalized per sample, jointly over t, h and w; with `per_frame=True`, per frame.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, per_frame: bool, dtype, param_dtype, rngs):
        del rngs  # initialization is deterministic; accepted so that all layers are built in the same way
        if channels % groups:
            raise UserError(f"GroupNorm: {channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.groups, self.eps, self.per_frame, self.dtype = groups, eps, per_frame, dtype

    def __call__(self, x: Array) -> Array:
        return self.normalise(x, *self.statistics(x))

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """Returns mean and variance of each channel's group, fp32 `[b, t, 1, 1, c]`, or `[b, 1, 1, 1, c]` over frames.

        Each channel is reduced first, then the results within a group: splitting the channel axis of `x` would move it
        through memory on TPU.
        """
        axes = (2, 3) if self.per_frame else (1, 2, 3)
        y = fp32(x)
        mean = self._over_groups(jnp.mean(y, axes, keepdims=True))
        return mean, self._over_groups(jnp.mean(jnp.square(y - mean), axes, keepdims=True))

    def normalise(self, x: Array, mean: Array, var: Array) -> Array:
        """Returns `x [b, t, h, w, c]` normalized with these statistics, scaled and shifted, in the compute dtype."""
        y = (fp32(x) - mean) * (lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)

    def _over_groups(self, x: Array) -> Array:
        """Returns `x [b, t, 1, 1, c]` with each channel replaced by the mean over its group."""
        n = x.shape[-1] // self.groups
        if platform() == "tpu":  # two small products; splitting and joining the channel axis would be four copies
            member = (jnp.arange(x.shape[-1])[:, None] // n == jnp.arange(self.groups)).astype(x.dtype)
            product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
            return product("...g,cg->...c", product("...c,cg->...g", x, member) / n, member)
        groups = rearrange(x, "b t 1 1 (g n) -> b t g n", g=self.groups).mean(-1)
        return repeat(groups, "b t g -> b t 1 1 (g n)", n=n)


class Conv2d(nnx.Module):
    """2-D convolution of each frame: `[..., h, w, i] -> [..., h', w', o]` (torch.nn.Conv2d).

    An integer `padding` is symmetric, as in torch; any other padding is `((top, bottom), (left, right))`. JAX's "SAME"
    differs at stride 2 and is never used.
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
        """Returns the convolution for frames of `shape [n, h, w, i]`: a matrix product on CPU where that is faster."""
        _, h, w, i = shape
        sizes = self.kernel.shape[:2], self.padding, self.stride
        if platform() == "cpu" and sizes == ((1, 1), ((0, 0), (0, 0)), (1, 1)):
            return lambda x, kernel: matmul(x, kernel[0, 0])
        if platform() == "cpu" and sizes == ((3, 3), ((1, 1), (1, 1)), (1, 1)) and h * w <= 32 and i >= 256:
            return conv3x3_by_matmul
        return partial(conv2d, padding=self.padding, strides=self.stride)

    def biased(self, y: Array) -> Array:
        """Returns `y [..., o]` plus the bias, if there is one."""
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def conv2d(x: Array, kernel: Array, padding, *, strides=(1, 1), lhs_dilation=(1, 1)) -> Array:
    """Returns the convolution `[n, h', w', o]` of `x [n, h, w, i]` with `kernel [k, l, i, o]`."""
    if on_one_cpu() and lhs_dilation == (1, 1):
        return _conv2d_on_cpu(x, kernel, tuple(padding), tuple(strides))
    return _conv2d(x, kernel, padding, strides, lhs_dilation=lhs_dilation)


def _conv2d(x: Array, kernel: Array, padding, strides, **dilation) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout, **dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d_on_cpu(x: Array, kernel: Array, padding, strides) -> Array:
    """Computes `_conv2d`, with gradients that are channels-last convolutions of transposed arrays.

    XLA brings the convolutions of JAX's own gradients to that form, too, but not inside loops and conditions, as of
    gradient accumulation: there it computes them some 80 times more slowly (jax-ml/jax#12868).
    """
    return _conv2d(x, kernel, padding, strides)


def _conv2d_forward(x: Array, kernel: Array, padding, strides):
    return _conv2d_on_cpu(x, kernel, padding, strides), (x, kernel)  # not _conv2d, for second derivatives


def _conv2d_backward(padding, strides, kept, g: Array):
    x, kernel = kept
    before = [p for p, _ in padding]
    # What the windows of the last outputs reach beyond the input's border, negative if they end before it.
    reach = [
        s * (out - 1) + k - before - size
        for s, out, k, before, size in zip(strides, g.shape[1:3], kernel.shape, before, x.shape[1:3], strict=False)
    ]
    ends = list(zip(before, reach, strict=True))
    edges = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, ends, strict=False)]
    for_x = g, rearrange(kernel[::-1, ::-1], "k l i o -> k l o i"), tuple(edges), (1, 1)
    for_kernel = rearrange(x, "n h w i -> i h w n"), rearrange(g, "n h w o -> h w n o"), tuple(ends), (1, 1)
    if strides == (1, 1):  # with second derivatives of the same kind, as R1 takes them
        to_x, to_kernel = _conv2d_on_cpu(*for_x), _conv2d_on_cpu(*for_kernel)
    else:
        to_x, to_kernel = _conv2d(*for_x, lhs_dilation=strides), _conv2d(*for_kernel, rhs_dilation=strides)
    return to_x, rearrange(to_kernel, "i k l o -> k l i o")


_conv2d_on_cpu.defvjp(_conv2d_forward, _conv2d_backward)


def conv3x3_by_matmul(x: Array, kernel: Array) -> Array:
    """Computes `conv2d` of `x [n, h, w, i]`, padded by one zero on each side, as one matrix product.

    It serves few pixels with many channels on CPU, where XLA's convolution takes tens of times as long.
    """
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = jnp.concatenate([padded[:, j : j + h, k : k + w] for j in range(3) for k in range(3)], axis=-1)
    return matmul(taps, rearrange(kernel, "j k i o -> (j k i) o"))


def temporal_form(form: str) -> str:
    """Returns "conv" or "matmul" for a form of `TemporalConv`, on the platform at hand."""
    return ("matmul" if platform() == "cpu" else "conv") if form == "auto" else form


class TemporalConv(nnx.Module):
    """Convolution of odd length k along time, zero padded: `[b, t, h, w, i] -> [b, t, h, w, o]` (torch Conv3d, kx1x1).

    `form="conv"` is one convolution, the right choice on accelerators: 3-D on TPU; on GPU 2-D over (time, pixels),
    because there XLA moves the channels to the front for a 3-D one. `form="matmul"`, for CPU, sums the shifted products
    of all taps: about twice as fast as XLA's 3-D convolution, and only `x` is kept for the gradient. "auto" is "matmul"
    on CPU and "conv" elsewhere.

    Raises:
      UserError: if `form` is none of these.
    """

    def __init__(self, i: int, o: int, kernel_size: int = 3, *, form: str = "auto", dtype, param_dtype, rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, 1, 1, i, o), param_dtype))
        self.bias = nnx.Param(jnp.zeros((o,), param_dtype))
        if form not in TEMPORAL_CONVS:
            raise UserError(f"temporal convolution form {form!r}: choose one of {', '.join(TEMPORAL_CONVS)}")
        self.form, self.dtype = form, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), gathered(self.kernel[...], self.dtype)
        k, (t, h, w) = kernel.shape[0], x.shape[1:4]
        pad = (k // 2, k // 2)
        convolve = temporal_form(self.form) == "conv"
        if convolve and platform() == "gpu" and shared_axis(h, w) != 3:
            y = conv2d(rearrange(x, "b t h w i -> b t (h w) i"), kernel[:, :, 0], (pad, (0, 0)))
            y = rearrange(y, "b t (h w) o -> b t h w o", h=h)
        elif convolve:
            y = lax.conv_general_dilated(
                x, kernel, (1, 1, 1), (pad, (0, 0), (0, 0)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            )
        else:
            products = (jnp.pad(matmul(x, tap[0, 0]), ((0, 0), pad, *((0, 0),) * 3)) for tap in kernel)
            y = sum(y[:, j : j + t] for j, y in enumerate(products))
        return y + self.bias[...].astype(self.dtype)


def sinusoidal_embedding(x: Array, dim: int) -> Array:
    """Returns fp32 sinusoids `[..., dim]` of `x [...]`, cosines first (diffusers Timesteps without frequency shift)."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(dim // 2, dtype=np.float32) / (dim // 2)).astype(np.float32)
    angles = jnp.asarray(x, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear on sinusoids (diffusers TimestepEmbedding)."""

    def __init__(self, i: int, hidden: int, o: int | None = None, **kw):
        self.linear_1 = Linear(i, hidden, **kw)
        self.linear_2 = Linear(hidden, o or hidden, **kw)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """Two normalized convolutions and a shortcut (diffusers ResnetBlock2D and TemporalResnetBlock).

    `temporal` replaces 3x3 convolutions by 3x1x1, and norms per frame by norms over all frames. `emb [b, d]` is added
    between the convolutions if `temb_channels` is given.
    """

    def __init__(
        self, i: int, o: int, *, temb_channels: int | None, groups: int, eps: float, temporal=False, form="auto", **kw
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
            # pyrefly: ignore[bad-argument-type]  # given wherever temb_channels is
            h = h + rearrange(self.time_emb_proj(nnx.silu(emb)), "b c -> b 1 1 1 c")
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AlphaBlender(nnx.Module):
    """Learned mix of the spatial and the temporal branch (diffusers AlphaBlender).

    The weight of the spatial branch is a = sigmoid(mix_factor) in the UNet, and 1 - a with `switch=True` (VAE decoder).
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
        """Returns the mix of `spatial`, the spatial resnet's output, with the temporal resnet's output from it."""
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

    Twice the size is computed on the small frame with 4/9 of the products, see `doubled`.
    """

    def __init__(self, channels: int, out_channels: int | None = None, **kw):
        self.conv = Conv2d(channels, out_channels or channels, 3, padding=1, **kw)

    def __call__(self, x: Array, size: tuple[int, ...] | None = None) -> Array:
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
    """Returns the 4x4 kernel that on zero-interleaved input equals the 3x3 kernel on nearest-upsampled input.

    Along an axis the taps (a, b, c) become (a, a + b, b + c, c), since pairs of neighbors in upsampled input are equal.
    Taps are added in fp32, so that they are rounded to the compute dtype only once.

    Args:
      kernel: `[3, 3, i, o]`.

    Returns:
      `[4, 4, i, o]`, at least fp32.
    """
    kernel = fp32(kernel)
    for axis in (0, 1):
        first, last = ([(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((0, 1), (1, 0)))
        kernel = jnp.pad(kernel, first) + jnp.pad(kernel, last)
    return kernel


def doubled(x: Array, kernel: Array) -> Array:
    """Returns the padded 3x3 convolution of `x [n, h, w, i]` upsampled to `[n, 2h, 2w, i]` by nearest neighbor.

    `kernel [4, 4, i, o]` holds the `merged_taps`. The form is a transposed convolution on TPU, and elsewhere one 2x2
    convolution for each parity of row and column: GPUs compute dilated inputs at full cost, and on CPU their gradient
    takes many times as long.
    """
    if platform() == "tpu":
        return conv2d(x, kernel, ((2, 2), (2, 2)), lhs_dilation=(2, 2))
    parities = [
        [conv2d(x, kernel[p::2, q::2], ((1 - p, p), (1 - q, q))) for q in (0, 1)] for p in (0, 1)
    ]  # rows 2 n + p, columns 2 m + q
    y = jnp.stack([jnp.stack(row, axis=3) for row in parities], axis=2)
    return rearrange(y, "n h p w q o -> n (h p) (w q) o")


def remat(fn: Callable, enabled: bool) -> Callable:
    """Returns `fn`, recomputed in the backward pass if `enabled` (jax.checkpoint)."""
    return jax.checkpoint(fn) if enabled else fn

"""I3D, the inflated Inception network trained on Kinetics-400 (arXiv 1705.07750), whose logits are FVD's features.

Module names are those of the common PyTorch port (`InceptionI3d`): `Mixed_3b.b1a.conv3d`, `logits.conv3d`. Convolutions
and pools pad like TensorFlow's SAME. Batch norm uses the stored statistics.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from sfv_jax.errors import UserError
from sfv_jax.models.partitioning import platform

Array = jax.Array

# Output channels of the branches b0, b1a, b1b, b2a, b2b, b3b of each mixed block.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Window and stride of the max pool before a block.
_POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
MIN_FRAMES = 9  # with fewer, less than the two time steps of the last pool are left


@dataclass(frozen=True)
class I3DConfig:
    """Sizes of I3D. `batch_norm_eps` is 1e-3 in TensorFlow, and 1e-5 in ports that kept PyTorch's default."""

    num_classes: int = 400
    batch_norm_eps: float = 1e-3


class Conv3d(nnx.Module):
    """Convolution with a kernel `[t, h, w, i, o]` and SAME padding; it has a bias only without batch norm."""

    def __init__(self, i: int, o: int, kernel: tuple[int, int, int], *, stride=1, use_bias=False, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*kernel, i, o)))
        self.bias = nnx.Param(jnp.zeros((o,))) if use_bias else None
        self.stride = (stride,) * 3

    def __call__(self, x: Array) -> Array:
        # XLA's 3-D convolutions on CPU are slow, most of all with few channels.
        convolve = _convolve_frames if platform() == "cpu" else _convolve
        y = convolve(x, self.kernel[...], self.stride)
        return y if self.bias is None else y + self.bias[...]


def _convolve(x: Array, kernel: Array, stride: tuple[int, int, int]) -> Array:
    """Returns the convolution of `x [b, t, h, w, i]` with `kernel [t, h, w, i, o]`, padding SAME."""
    layout = ("NDHWC", "DHWIO", "NDHWC")
    # By default TPUs would multiply in bfloat16 and GPUs in TF32.
    return lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=layout, precision="highest")


def _convolve_frames(x: Array, kernel: Array, stride: tuple[int, int, int]) -> Array:
    """Returns `_convolve(...)` as a 2-D convolution of single frames that have their neighbors as further channels."""
    b, t = x.shape[:2]
    taps, step = kernel.shape[0], stride[0]
    count = -(-t // step)
    padding = max((count - 1) * step + taps - t, 0)
    before = padding // 2
    x = jnp.pad(x, ((0, 0), (before, padding - before), *[(0, 0)] * 3))
    x = jnp.concatenate([x[:, n : n + (count - 1) * step + 1 : step] for n in range(taps)], axis=-1)
    x, kernel = rearrange(x, "b t h w c -> (b t) h w c"), rearrange(kernel, "t h w i o -> h w (t i) o")
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, stride[1:], "SAME", dimension_numbers=layout, precision="highest")
    return rearrange(y, "(b t) h w c -> b t h w c", b=b)


class BatchNorm(nnx.Module):
    """Batch norm over `[b, t, h, w, c]` with stored statistics."""

    def __init__(self, channels: int, eps: float):
        self.scale, self.bias = nnx.Param(jnp.ones((channels,))), nnx.Param(jnp.zeros((channels,)))
        self.mean, self.var = nnx.Param(jnp.zeros((channels,))), nnx.Param(jnp.ones((channels,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        factor = self.scale[...] * lax.rsqrt(self.var[...] + self.eps)
        return x * factor + (self.bias[...] - self.mean[...] * factor)


class Unit(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, i: int, o: int, kernel: int, *, stride=1, eps: float, rngs):
        self.conv3d = Conv3d(i, o, (kernel,) * 3, stride=stride, rngs=rngs)
        self.bn = BatchNorm(o, eps)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.bn(self.conv3d(x)))


class Mixed(nnx.Module):
    """Four parallel branches, concatenated along channels."""

    def __init__(self, i: int, widths: tuple[int, ...], **kw):
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(i, b0, 1, **kw)
        self.b1a, self.b1b = Unit(i, b1a, 1, **kw), Unit(b1a, b1b, 3, **kw)
        self.b2a, self.b2b = Unit(i, b2a, 1, **kw), Unit(b2a, b2b, 3, **kw)
        self.b3b = Unit(i, b3b, 1, **kw)

    def __call__(self, x: Array) -> Array:
        branches = (
            self.b0(x),
            self.b1b(self.b1a(x)),
            self.b2b(self.b2a(x)),
            self.b3b(_max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)


class Logits(nnx.Module):
    """1x1x1 convolution to class logits."""

    def __init__(self, i: int, classes: int, *, rngs):
        self.conv3d = Conv3d(i, classes, (1, 1, 1), use_bias=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv3d(x)


class I3D(nnx.Module):
    """Network from `frames [b, t, 224, 224, 3]` in [-1, 1] to logits `[b, num_classes]`, averaged over time; t >= 9."""

    def __init__(self, config: I3DConfig, *, rngs, dtype=None, param_dtype=None):
        del dtype, param_dtype  # always fp32, products included: a metric has one precision
        kw = dict(eps=config.batch_norm_eps, rngs=rngs)
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2, **kw)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1, **kw)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3, **kw)
        width = 192
        for name, widths in _MIXED.items():
            setattr(self, name, Mixed(width, widths, **kw))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Logits(width, config.num_classes, rngs=rngs)

    def __call__(self, frames: Array) -> Array:
        if frames.shape[1] < MIN_FRAMES:
            raise UserError(f"I3D needs at least {MIN_FRAMES} frames, got {frames.shape[1]}")
        x = self.Conv3d_1a_7x7(frames)
        for name in ("Conv3d_2b_1x1", "Conv3d_2c_3x3", *_MIXED):
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = getattr(self, name)(x)
        window = (1, 2, x.shape[2], x.shape[3], 1)
        x = lax.reduce_window(x, 0.0, lax.add, window, (1,) * 5, "VALID") / (2 * x.shape[2] * x.shape[3])
        return jnp.mean(self.logits(x), axis=(1, 2, 3))


def _max_pool(x: Array, window: tuple[int, int, int], stride: tuple[int, int, int]) -> Array:
    """Returns the maxima of `x [b, t, h, w, c]`, padding SAME; on CPU axis by axis, which takes fewer comparisons."""
    if platform() != "cpu":
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
    for axis, sizes in enumerate(zip(window, stride, strict=True), 1):
        across, step = ([size if n == axis else 1 for n in range(5)] for size in sizes)
        x = lax.reduce_window(x, -jnp.inf, lax.max, across, step, "SAME")
    return x


def preprocess(frames: Array, size: int = 224, antialias: bool = False) -> Array:
    """Returns fp32 `[b, t, size, size, 3]` in [-1, 1] from uint8 `frames [b, t, h, w, 3]`.

    The resize is bilinear with half-pixel centers and does not keep the aspect ratio. Without `antialias` it equals
    torch's `interpolate(..., align_corners=False)`, which the common FVD code uses; the choice changes scores, so it
    is part of the metric.
    """
    b, t, _, _, c = frames.shape
    x = jnp.asarray(frames).astype(jnp.float32)
    x = jax.image.resize(x, (b, t, size, size, c), "linear", antialias=antialias)
    return x * (2 / 255) - 1

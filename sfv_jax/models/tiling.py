"""Exact tiling: per-frame layers run a few frames at a time; frame-mixing layers run on spatial strips.

A spatial residual block treats each frame separately, norms included. A temporal one treats each pixel separately,
except for its two norms, whose statistics over the whole clip are computed first. So tiles never overlap, and only the
temporal block's first convolution is computed twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sfv_jax.models.layers import SpatioTemporalResBlock
from sfv_jax.models.partitioning import BATCH, axis_size, rows, shared_axis

Array = jax.Array
FEW = 4  # arrays of up to this many pieces are computed whole


def in_pieces(fn: Callable, x: Array, axis: int, count: int) -> Array:
    """Computes `fn(x)` from `count` equal pieces of `x [b, t, h, w, c]` along `axis`, one after another.

    `fn` must treat all positions along `axis` alike and separately. If it keeps shape and dtype, the result takes the
    memory of `x`.
    """
    if count == 1:
        return fn(x)
    size = x.shape[axis] // count

    def piece(source: Array, n) -> Array:
        return fn(lax.dynamic_slice_in_dim(source, n * size, size, axis))

    out = jax.eval_shape(piece, x, 0)
    shape = (*out.shape[:axis], count * out.shape[axis], *out.shape[axis + 1 :])
    in_place = (shape, out.dtype) == (x.shape, x.dtype)
    if in_place:
        start = x
    else:  # memory for the result; the value taken from `x` stops XLA from allocating it long before `x` exists
        start = rows(jnp.full(shape, x[(0,) * x.ndim], out.dtype))

    def step(n, made: Array) -> Array:
        new = piece(made if in_place else x, n)
        return lax.dynamic_update_slice_in_dim(made, new, n * out.shape[axis], axis)

    return lax.fori_loop(0, count, step, start)


def frame_pieces(x: Array, size: tuple[int, ...], pixels: int) -> int:
    """Returns how many pieces of at most `pixels` per device the frames of `x [b, t, ...]` make at `size` (h, w)."""
    return _count(x.shape[1], x.shape[0] * size[0] * size[1], pixels)


def mix(block: SpatioTemporalResBlock, spatial: Array, pixels: int) -> Array:
    """Computes `block.mix(spatial)` for `spatial [b, t, h, w, c]` in strips of at most `pixels` per device.

    Strips consist of columns, or of rows if devices share the columns.
    """
    axis = 2 if shared_axis(*spatial.shape[2:4]) == 3 else 3
    count = _count(spatial.shape[axis], spatial.size // spatial.shape[axis] // spatial.shape[-1], pixels)
    if count == 1:
        return block.mix(spatial)
    temporal = block.temporal_res_block
    before = temporal.norm1.statistics(spatial)

    def first(x: Array) -> Array:
        return temporal.conv1(nnx.silu(temporal.norm1.normalise(x, *before)))

    def statistics(n) -> tuple[Array, Array]:
        size = spatial.shape[axis] // count
        return temporal.norm2.statistics(first(lax.dynamic_slice_in_dim(spatial, n * size, size, axis)))

    means, variances = lax.map(statistics, jnp.arange(count))
    between = means.mean(0), variances.mean(0) + means.var(0)  # exact, as all strips have one size

    def rest(x: Array) -> Array:
        h = temporal.conv2(nnx.silu(temporal.norm2.normalise(first(x), *between)))
        return block.time_mixer(x, x + h)

    return rows(in_pieces(rest, spatial, axis, count))


def _count(length: int, pixels_each: int, pixels: int) -> int:
    """Returns the least number of equal pieces of `length` with at most `pixels` per device, or `length` if none has.

    It is 1 if the whole has no more than `FEW` times as many.
    """
    each = pixels_each / axis_size(*BATCH, "spatial")
    if not pixels or length * each <= FEW * pixels:
        return 1
    counts = (n for n in range(1, length + 1) if length % n == 0 and length // n * each <= pixels)
    return next(counts, length)

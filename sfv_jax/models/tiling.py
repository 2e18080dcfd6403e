"""Large activations in pieces, exactly: a few frames at a time what mixes no frames, strips of all frames what does.

A spatial residual block sees each frame by itself, norms included. A temporal one sees each pixel by itself, but for
its two norms, whose statistics over the whole clip are taken before. So nothing overlaps, and only the temporal block's
first convolution is computed twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sfv_jax.models.layers import SpatioTemporalResBlock
from sfv_jax.models.partitioning import BATCH, axis_size, rows, shared_axis

Array = jax.Array
FEW = 4  # times the size of a piece: what is not larger stays whole


def in_pieces(fn: Callable, x: Array, axis: int, count: int) -> Array:
    """`fn(x)` from `count` equal pieces of `axis` of `x [b, t, h, w, c]`, one after another.

    `fn` must treat positions along `axis` alike and by themselves. Where it keeps shape and dtype the result takes the
    place of `x`.
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
    else:  # room for the result, filled with a number of `x`: else XLA may make it long before `x` is there
        start = rows(jnp.full(shape, x[(0,) * x.ndim], out.dtype))

    def step(n, made: Array) -> Array:
        new = piece(made if in_place else x, n)
        return lax.dynamic_update_slice_in_dim(made, new, n * out.shape[axis], axis)

    return lax.fori_loop(0, count, step, start)


def frame_pieces(x: Array, size: tuple[int, int], pixels: int) -> int:
    """Into how many pieces to divide the frames of `x [b, t, ...]`, at `size (h, w)`, for at most `pixels` a device."""
    return _count(x.shape[1], x.shape[0] * size[0] * size[1], pixels)


def mix(block: SpatioTemporalResBlock, spatial: Array, pixels: int) -> Array:
    """The temporal half of `block` on the output `[b, t, h, w, c]` of the spatial one, in strips of `pixels` at most.

    Strips are of columns, or of rows where devices share the columns.
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
    between = means.mean(0), variances.mean(0) + means.var(0)  # of strips of one size

    def rest(x: Array) -> Array:
        h = temporal.conv2(nnx.silu(temporal.norm2.normalise(first(x), *between)))
        return block.time_mixer(x, x + h)

    return rows(in_pieces(rest, spatial, axis, count))


def _count(length: int, pixels_each: int, pixels: int) -> int:
    """How many equal pieces of `length` hold `pixels` per device at most, or `length`; 1 if four times as many do."""
    each = pixels_each / axis_size(*BATCH, "spatial")
    if not pixels or length * each <= FEW * pixels:
        return 1
    counts = (n for n in range(1, length + 1) if length % n == 0 and length // n * each <= pixels)
    return next(counts, length)

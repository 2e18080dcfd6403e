"""Placement of a network's weights and activations on the current mesh (`jax.set_mesh`); without a mesh, no effect.

Mesh axes: `data` and `fsdp` share the batch, `fsdp` the stored weights, `spatial` the rows (or columns) of each frame.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import PartitionSpec as P

from sfv_jax.runtime.sharding import split

Array = jax.Array
BATCH = ("data", "fsdp")


def axis_size(*names: str) -> int:
    """Returns the number of devices along the named mesh axes together; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu" of the current mesh (possibly another machine's), else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def gathered(weight: Array, dtype) -> Array:
    """Returns `weight` in the compute dtype, whole on every device; called right before the weight is used.

    Without this, XLA may keep the weight sharded and exchange activations instead, which is far more. Under remat the
    backward pass gathers again.
    """
    devices = axis_size("fsdp")
    if devices == 1:
        return weight.astype(dtype)
    if weight.dtype != dtype:  # shard the copy explicitly, or XLA may gather `weight` itself and convert afterwards
        axis = split(weight.shape, devices)
        parts = P(*("fsdp" if n == axis else None for n in range(weight.ndim)))
        weight = lax.with_sharding_constraint(weight.astype(dtype), parts)
    return lax.with_sharding_constraint(weight, P())


def rows(x: Array, *sizes: tuple[int, ...]) -> Array:
    """Returns `x [b, t, h, w, c]` sharded over samples, and over the rows or columns that `shared_axis` chooses.

    For layers that change resolution, the shared axis must also divide `sizes`, further pairs (h, w). jaxlib 0.10.2
    computes wrong kernel gradients, by whole factors, if some devices of a convolution hold nothing but padding.
    """
    if axis_size(*BATCH, "spatial") == 1:
        return x
    heights, widths = zip(x.shape[2:4], *sizes, strict=True)
    axis = shared_axis(math.gcd(*heights), math.gcd(*widths))
    axes = {2: ("spatial",), 3: (None, "spatial"), None: ()}[axis]
    return lax.with_sharding_constraint(x, P(BATCH, None, *axes))


def shared_axis(height: int, width: int) -> int | None:
    """Returns the axis of `[b, t, h, w, c]` that devices along `spatial` share: 2 (rows), 3 (columns) or None.

    Of the sides that divide it is the longer: its borders are shorter, and its halves divide more often, so that fewer
    levels change the axis. On GPU rows come first if both divide: convolutions along time take pixels row by row there.
    """
    n = axis_size("spatial")
    axes = ((2, height), (3, width))
    longer_first = reversed(axes) if width > height and platform() != "gpu" else axes
    return None if n == 1 else next((axis for axis, size in longer_first if size % n == 0), None)


def flat(x: Array) -> Array:
    """Returns tokens `[b, t, s, c]` of `x [b, t, h, w, c]` row by row, or column by column if devices share columns."""
    return rearrange(x, "b t h w c -> b t (w h) c" if shared_axis(*x.shape[2:4]) == 3 else "b t h w c -> b t (h w) c")


def unflat(tokens: Array, height: int, width: int) -> Array:
    """Returns `[b, t, h, w, c]` from tokens `[b, t, s, c]`: the inverse of `flat`."""
    order = "b t (w h) c -> b t h w c" if shared_axis(height, width) == 3 else "b t (h w) c -> b t h w c"
    return rearrange(tokens, order, h=height, w=width)


def per_row(attend: Callable, q: Array, k: Array, v: Array, *, partitioned: bool = True) -> Array:
    """Computes `attend(q, k, v)` when each device holds some rows (or columns) of each frame. All `[n, s, heads, d]`.

    The partitioning is explicit because flash kernels are opaque to XLA. Devices exchange their tokens for whole frames
    of some heads if frames x heads divide among them with at most a quarter of padding; otherwise they attend from
    their own queries to gathered keys. If samples or tokens do not divide, XLA partitions `attend`; if it cannot do
    that either (`partitioned=False`), devices repeat each other's work along the axis that does not divide.
    """
    shared = axis_size("spatial") if partitioned else axis_size(*BATCH, "spatial")
    if shared == 1:
        return attend(q, k, v)
    samples, tokens = q.shape[0] % axis_size(*BATCH) == 0, q.shape[1] % axis_size("spatial") == 0
    if partitioned and not (samples and tokens):
        k, v = (lax.with_sharding_constraint(x, P(BATCH)) for x in (k, v))
        return attend(q, k, v)
    whole = P(BATCH if samples else None)
    mine = P(*whole, "spatial" if tokens else None)
    # Gradients of keys that are replicated along `spatial` are summed over it; with one device that sum is a copy.
    keys = whole if axis_size("spatial") > 1 else mine
    units = q.shape[0] // (axis_size(*BATCH) if samples else 1) * q.shape[2]
    if tokens and axis_size("spatial") > 1 and -units % axis_size("spatial") <= units / 4:
        attend, keys = partial(_exchanged, attend), mine
    return jax.shard_map(attend, in_specs=(mine, keys, keys), out_specs=mine, check_vma=False)(q, k, v)


def _exchanged(attend: Callable, q: Array, k: Array, v: Array) -> Array:
    """Computes `attend` on a device's tokens `[n, s, heads, d]` by exchange: each device takes some of the n x heads.

    Four exchanges of 1 / devices of an array move less than gathering two whole arrays. Shares are padded to one size.
    """
    n, _, heads, _ = q.shape
    pad = -(n * heads) % lax.axis_size("spatial")

    def whole(x: Array) -> Array:
        x = jnp.pad(rearrange(x, "n s h d -> (n h) s d"), ((0, pad), (0, 0), (0, 0)))
        return rearrange(lax.all_to_all(x, "spatial", 0, 1, tiled=True), "m s d -> m s 1 d")

    out = rearrange(attend(whole(q), whole(k), whole(v)), "m s 1 d -> m s d")
    out = lax.all_to_all(out, "spatial", 1, 0, tiled=True)[: n * heads]
    return rearrange(out, "(n h) s d -> n s h d", h=heads)


def promote(arrays: tuple, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Promotes (input, kernel, bias) to the compute dtype as Flax does, and gathers the kernel."""
    x, _, bias = dtypes.promote_dtype(arrays, dtype=dtype, inexact=inexact)
    return x, gathered(arrays[1], x.dtype), bias

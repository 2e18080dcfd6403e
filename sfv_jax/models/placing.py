"""Where weights and activations of a network live on the mesh in use (`jax.set_mesh`); without one, nothing happens.

Mesh axes: `data` and `fsdp` share the batch, `fsdp` the stored weights, `spatial` the rows of every frame.
"""

import math
from collections.abc import Callable

import jax
from flax.nnx.nn import dtypes
from jax import lax
from jax.sharding import PartitionSpec as P

Array = jax.Array
BATCH = ("data", "fsdp")


def axis_size(*names: str) -> int:
    """Devices along mesh axes together; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(name, 1) for name in names)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in use, which may belong to another machine; else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def gathered(weight: Array) -> Array:
    """`weight` whole on every device, right before it is used.

    To be called on the copy in compute dtype. Without this XLA may leave the weight in its parts and exchange
    activations instead, which is far more. Under remat the backward pass gathers again.
    """
    return lax.with_sharding_constraint(weight, P()) if axis_size("fsdp") > 1 else weight


def rows(x: Array, *sizes: tuple[int, int]) -> Array:
    """`x [b, t, h, w, c]` by samples, and by rows if they divide over `spatial`, else by columns, else by neither.

    What changes the size is to be computed where both sizes divide: `sizes (h, w)` are others that must, too. jaxlib
    0.10.2 gets kernels' gradients wrong, by whole factors, where a convolution's devices hold padding only.
    """
    if axis_size(*BATCH, "spatial") == 1:
        return x
    heights, widths = zip(x.shape[2:4], *sizes, strict=True)
    axis = shared_axis(math.gcd(*heights), math.gcd(*widths))
    axes = {2: ("spatial",), 3: (None, "spatial"), None: ()}[axis]
    return lax.with_sharding_constraint(x, P(BATCH, None, *axes))


def shared_axis(height: int, width: int) -> int | None:
    """The axis of `[b, t, h, w, c]` that devices along `spatial` share: 2 (rows), 3 (columns) or none."""
    n = axis_size("spatial")
    return None if n == 1 else 2 if height % n == 0 else 3 if width % n == 0 else None


def per_row(attend: Callable, q: Array, k: Array, v: Array, *, partitioned: bool = True) -> Array:
    """`attend(q, k, v)` of the queries in a device's rows with the keys of the whole frame. All `[n, s, heads, d]`.

    Explicit, since flash kernels are opaque to XLA. Where samples or tokens do not divide it is left to XLA; if XLA
    cannot partition `attend` over samples either (`partitioned=False`), devices repeat each other's work there.
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
    return jax.shard_map(attend, in_specs=(mine, whole, whole), out_specs=mine, check_vma=False)(q, k, v)


def promote(arrays: tuple, *, dtype=None, inexact: bool = True) -> tuple:
    """Flax's promotion of (input, kernel, bias) to the compute dtype, with the kernel gathered."""
    x, kernel, bias = dtypes.promote_dtype(arrays, dtype=dtype, inexact=inexact)
    return x, gathered(kernel), bias

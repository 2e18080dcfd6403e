"""Where arrays live: one mesh, one table of rules for stored arrays, one rule for batches.

Axes: `data` and `fsdp` share the batch, `fsdp` also stores the parts of parameters, EMA and optimiser state, `spatial`
shares the rows of every frame. Weights are gathered where they are used, activations stay in place
(sfv_jax/models/placing.py). All axes are Auto, so a step computes the same function on every mesh.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sfv_jax.errors import UserError

AXES = ("data", "fsdp", "spatial")
BATCH = P(("data", "fsdp"))
SMALL = 2**14  # elements below which a tensor is replicated: gathering it costs more than keeping it


def replicated(shape: Sequence[int], n: int) -> None:
    """Whole on every device."""
    del shape, n


def split(shape: Sequence[int], n: int) -> int | None:
    """The largest axis of `shape` that divides by `n` devices, the last of equals; None if it is not worth it."""
    axes = [axis for axis, size in enumerate(shape) if size % n == 0]
    return max(axes, key=lambda axis: (shape[axis], axis)) if axes and np.prod(shape) >= SMALL else None


# The first match on a path decides. Moments, momentum, EMA and SM3's accumulators end in the path of their parameter.
RULES: tuple[tuple[str, Callable], ...] = (
    (r"(^|\.)(bias|scale|mix_factor|class_embedding)$", replicated),  # vectors and scalars
    (r"(^|\.)(kernel|embedding)$", split),  # linear maps, convolutions, position tables
    (r"(^|\.)(step|count)$", replicated),
)
ACCUMULATOR = re.compile(r"((?:^|.*\.)accumulators\..*)\.(\d+)$")  # of an axis of a parameter


def make_mesh(data: int = -1, fsdp: int = 1, spatial: int = 1, devices=None) -> jax.sharding.Mesh:
    """Mesh over `devices` (all by default) with the axes of `AXES`; `data=-1` takes what the others leave.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = max(len(devices) // (fsdp * spatial), 1)
    if min(data, fsdp, spatial) < 1 or data * fsdp * spatial != len(devices):
        raise UserError(f"mesh data={data} fsdp={fsdp} spatial={spatial} does not cover {len(devices)} devices")
    grid = np.asarray(devices).reshape(data, fsdp, spatial)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def first_devices(sizes: tuple[int, ...] | None) -> jax.sharding.Mesh | None:
    """Mesh of these `sizes` (data, fsdp[, spatial]) over as many devices, the first there are; None for None."""
    return sizes and make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def param_shardings(mesh: jax.sharding.Mesh, abstract):
    """Tree of shardings for parameters, optimiser state and EMA (arrays or shapes), by `RULES`.

    Accumulator r of SM3, `[n_r]`, is placed like axis r of its parameter.

    Raises:
      ValueError: naming the paths that no rule covers.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    whole: dict[str, dict[int, int]] = {}  # sizes of the axes of the parameter behind a path
    parts = []  # (parameter's path, its axes that an array has)
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        found = ACCUMULATOR.match(path)
        parts.append((found[1], (int(found[2]),)[: leaf.ndim]) if found else (path, range(leaf.ndim)))
        whole.setdefault(parts[-1][0], {}).update(zip(parts[-1][1], leaf.shape, strict=True))
    rules = {path: _rule(path) for path in whole}
    if uncovered := sorted(path for path, rule in rules.items() if rule is None):
        raise ValueError("no rule of sharding.RULES covers " + ", ".join(uncovered))
    n, shared = mesh.shape["fsdp"], {}
    for path, sizes in whole.items():
        shape = [sizes.get(r, 1) for r in range(max(sizes, default=-1) + 1)]
        shared[path] = rules[path](shape, n) if n > 1 else None
    specs = [P(*("fsdp" if axis == shared[path] else None for axis in axes)) for path, axes in parts]
    return structure.unflatten([NamedSharding(mesh, spec) for spec in specs])


def _rule(path: str) -> Callable | None:
    return next((rule for pattern, rule in RULES if re.search(pattern, path)), None)


def with_shardings(abstract, shardings):
    """`abstract` shapes that say where they are wanted, as restoring takes them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def on_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """`function`, called with `mesh` as the mesh in use: networks place their weights and activations on it."""

    def call(*args, **kw):
        with jax.set_mesh(mesh):
            return function(*args, **kw)

    return call


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Samples over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def local_rows(mesh: jax.sharding.Mesh, batch_size: int, accumulation_steps: int = 1) -> np.ndarray:
    """The rows of a global batch that the devices of this process need, ascending.

    Processes whose devices share samples along `spatial` get the same rows.

    Raises:
      UserError: if a micro-batch cannot be shared evenly.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulation_steps * shares):
        raise UserError(
            f"batch_size={batch_size} does not divide into accumulation_steps={accumulation_steps} times "
            f"data x fsdp = {shares} devices of the mesh"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def put_batch(mesh: jax.sharding.Mesh, batch: dict) -> dict:
    """The global batch of which this process holds the `local_rows` (numpy, `[rows, ...]`)."""
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    held = len(local_rows(mesh, parts))

    def place(x):
        size = len(x) * parts // held
        mine = local_rows(mesh, size)
        rows = lambda index: np.searchsorted(mine, np.arange(size)[index[0]])  # noqa: E731
        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, lambda index: x[rows(index)])

    return jax.tree.map(place, batch)

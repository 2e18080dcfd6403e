"""Placement of arrays on devices: one mesh, one table of rules for stored arrays, one rule for batches.

Mesh axes: `data` and `fsdp` share the batch, `fsdp` also the storage of parameters, EMA and optimizer state, `spatial`
the rows of every frame. Weights are gathered where they are used, activations stay in place
(sfv_jax/models/partitioning.py). All axes are Auto, so a step computes the same function on every mesh.
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
SMALL = 2**14  # a tensor of fewer elements is replicated: gathering it would cost more than the copies


def replicated(shape: Sequence[int], n: int) -> None:
    """Returns None: the array is whole on every device."""
    del shape, n


def split(shape: Sequence[int], n: int) -> int | None:
    """Returns the axis of `shape` to split over `n` devices: the largest divisible one, the last if several are equal.

    Returns None, for replication, if no axis is divisible or the array has fewer than `SMALL` elements.
    """
    axes = [axis for axis, size in enumerate(shape) if size % n == 0]
    return max(axes, key=lambda axis: (shape[axis], axis)) if axes and np.prod(shape) >= SMALL else None


# The first match on a path applies. Moments, momentum, EMA and SM3's accumulators end in the path of their parameter.
RULES: tuple[tuple[str, Callable], ...] = (
    (r"(^|\.)(bias|scale|mix_factor|class_embedding)$", replicated),  # vectors and scalars
    (r"(^|\.)(kernel|embedding)$", split),  # linear maps, convolutions, position tables
    (r"(^|\.)(step|count|balance\.\w+)$", replicated),
)
ACCUMULATOR = re.compile(r"((?:^|.*\.)accumulators\..*)\.(\d+)$")  # path of a parameter, number of its axis


def make_mesh(data: int = -1, fsdp: int = 1, spatial: int = 1, devices=None) -> jax.sharding.Mesh:
    """Returns a mesh with the axes `AXES`.

    Args:
      data, fsdp, spatial: sizes of the axes; `data=-1` takes all devices that the other two leave.
      devices: the devices; default: all.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = max(len(devices) // max(fsdp * spatial, 1), 1)
    if min(data, fsdp, spatial) < 1 or data * fsdp * spatial != len(devices):
        divisors = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise UserError(
            f"mesh data={data} fsdp={fsdp} spatial={spatial} does not cover {len(devices)} devices: choose among "
            f"{divisors}, with the product {len(devices)}"
        )
    grid = np.asarray(devices).reshape(data, fsdp, spatial)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def first_devices(sizes: tuple[int, ...] | None) -> jax.sharding.Mesh | None:
    """Returns a mesh of `sizes` (data, fsdp[, spatial]) over the first devices, as many as it needs; None for None."""
    return None if sizes is None else make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def param_shardings(mesh: jax.sharding.Mesh, abstract):
    """Returns shardings by `RULES` for a tree of parameters, optimizer state and EMA (arrays or shapes).

    Accumulator r of SM3, `[n_r]`, is placed like axis r of its parameter.

    Raises:
      ValueError: if no rule covers some path; lists all such paths.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    whole: dict[str, dict[int, int]] = {}  # {parameter's path: {axis: size}}
    parts = []  # of each array: its parameter's path, and which of the parameter's axes it has
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        found = ACCUMULATOR.match(path)
        parts.append((found[1], (int(found[2]),)[: leaf.ndim]) if found else (path, range(leaf.ndim)))
        whole.setdefault(parts[-1][0], {}).update(zip(parts[-1][1], leaf.shape, strict=True))
    rules = {path: rule for path in whole if (rule := _rule(path))}
    if uncovered := sorted(whole.keys() - rules.keys()):
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
    """Attaches shardings to abstract arrays, as restoring expects."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def on_mesh(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """Returns `function` with `mesh` as the current mesh of its calls, where networks place weights and activations."""

    def call(*args, **kw):
        with jax.set_mesh(mesh):
            return function(*args, **kw)

    return call


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a batch: samples over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def local_rows(mesh: jax.sharding.Mesh, batch_size: int, accumulation_steps: int = 1) -> np.ndarray:
    """Returns the ascending rows of a global batch that the devices of this process need.

    Processes whose devices share samples along `spatial` have the same rows.

    Raises:
      UserError: if the micro-batches do not divide evenly over `data` and `fsdp`.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulation_steps * shares):
        step = accumulation_steps * shares
        near = [n for n in (batch_size // step * step, (batch_size // step + 1) * step) if n]
        parts = [n for n in range(accumulation_steps, 0, -1) if batch_size % (n * shares) == 0][:1]
        remedy = [f"--config.accumulation_steps={n}" for n in parts]
        remedy += [f"--config.batch_size={' or '.join(map(str, near))}"]
        raise UserError(
            f"batch_size={batch_size} is no multiple of accumulation_steps={accumulation_steps} times the devices "
            f"that share a batch (data x fsdp = {shares}); set {', or '.join(remedy)}"
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def spread(arrays, shardings):
    """Returns copies of a tree of whole arrays, the same in every process, in the `shardings`, a tree like it."""

    def place(x, sharding):
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))

    return jax.tree.map(place, arrays, shardings)


def put_batch(mesh: jax.sharding.Mesh, batch: dict) -> dict:
    """Returns the global batch on `mesh`; `batch` has numpy arrays `[rows, ...]`, the `local_rows` of this process."""
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    held = len(local_rows(mesh, parts))

    def place(x):
        size = len(x) * parts // held
        mine = local_rows(mesh, size)
        rows = lambda index: np.searchsorted(mine, np.arange(size)[index[0]])  # noqa: E731
        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, lambda index: x[rows(index)])

    return jax.tree.map(place, batch)

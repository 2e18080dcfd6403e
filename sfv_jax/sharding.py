"""Where arrays live: one mesh, one rule for parameters, one for batches.

Axes: `data` and `fsdp` share the batch, `fsdp` also the parameters, `spatial` the rows of a video (not used yet).
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "spatial")
SMALL = 2**14  # elements below which a tensor is replicated: gathering it costs more than keeping it


def make_mesh(data: int = -1, fsdp: int = 1, spatial: int = 1, devices=None) -> jax.sharding.Mesh:
    """Mesh over `devices` (all by default) with the axes of `AXES`; `data=-1` takes what the others leave.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = max(len(devices) // (fsdp * spatial), 1)
    if data * fsdp * spatial != len(devices):
        raise ValueError(f"mesh data={data} fsdp={fsdp} spatial={spatial} does not cover {len(devices)} devices")
    grid = np.asarray(devices).reshape(data, fsdp, spatial)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(mesh: jax.sharding.Mesh, abstract):
    """Tree of shardings for parameters, optimiser state and EMA: the largest axis that divides, over `fsdp`.

    Tensors of fewer than `SMALL` elements, and those no axis of which divides, are replicated.
    """
    n = mesh.shape["fsdp"]

    def place(x):
        axes = [r for r in range(len(x.shape)) if x.shape[r] % n == 0]
        if n == 1 or x.size < SMALL or not axes:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda r: x.shape[r])
        return NamedSharding(mesh, P(*("fsdp" if r == axis else None for r in range(len(x.shape)))))

    return jax.tree.map(place, abstract)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Samples over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def put_batch(mesh: jax.sharding.Mesh, batch: dict) -> dict:
    """The global batch whose local part, on this process, is `batch` (numpy, `[b / processes, ...]`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_tree(tree, shardings):
    """`tree` (numpy or jax arrays) placed by `shardings`."""
    return jax.tree.map(jax.device_put, tree, shardings)

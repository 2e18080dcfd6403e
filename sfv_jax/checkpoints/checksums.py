"""Checksums of arrays, equal on the host and on devices, whatever the mesh and the number of processes.

The checksum of an array, its fingerprint, has 32 bits: the bits of each element times an odd weight from its index,
summed. Any change of a single element changes it, and integer sums do not depend on their order. Elements have at most
4 bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 2**16  # elements; such arrays are summed by the host, sooner than a program for each shape is compiled
_PART = 2**16  # elements that are summed at a time, few enough for the cache
_ODD = 2 * np.arange(_PART, dtype=np.uint32) + 1


def fingerprint(value: np.ndarray) -> int:
    """Returns the fingerprint of an array of the host."""
    bits = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").reshape(-1)
    total = 0
    for start in range(0, bits.size, _PART):
        part = bits[start : start + _PART].astype(np.uint32)
        weighted = (part * _ODD[: part.size]).sum(dtype=np.uint32)
        total += int(weighted) + 2 * start * int(part.sum(dtype=np.uint32))
    return total % 2**32


def fingerprints(state) -> dict[str, int]:
    """Returns the fingerprint of each array of a tree, by path."""
    return examine(state)[0]


def examine(state) -> tuple[dict[str, int], list[str]]:
    """Reads every array of a tree once; of large ones, which their devices read, two numbers are fetched.

    Returns:
      fingerprints: by path.
      bad: paths of the arrays with NaN or infinity.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    here = jax.device_get({n: x for n, (_, x) in enumerate(leaves) if _is_small(x)})
    # With several fake devices on a CPU, collectives of many programs in flight may block each other's threads forever.
    finish = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x
    values = jax.device_get({n: finish(_measure(x)) for n, (_, x) in enumerate(leaves) if n not in here})
    values |= {n: (fingerprint(x), np.all(np.isfinite(x))) for n, x in here.items()}
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    bad = [path for n, path in enumerate(paths) if not values[n][1]]
    return {path: int(values[n][0]) for n, path in enumerate(paths)}, bad


def _is_small(x: jax.Array | np.ndarray) -> bool:
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated  # else parts are elsewhere
    return x.size <= SMALL and whole


@jax.jit
def _measure(x: jax.Array) -> jax.Array:
    """Returns the fingerprint of an array and 1 if all elements are finite, else 0; uint32 `[2]`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack([jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32), jnp.all(jnp.isfinite(x)).astype(jnp.uint32)])

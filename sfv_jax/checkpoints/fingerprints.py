"""Fingerprints of the parameters of a model folder: the storage does not detect a flipped bit in stored numbers.

`fingerprints.json` has, per network and array, the checksum that training checkpoints have (`checksums`), of
the array as it is stored and cast to `CASTS`. So arrays are verified as they arrive on the devices, cast and sharded.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sfv_jax.checkpoints import checksums
from sfv_jax.checkpoints.checksums import fingerprint
from sfv_jax.models import tree
from sfv_jax.weights.folders import WeightsError, read_json
from sfv_jax.weights.lazy import Lazy

FILE = "fingerprints.json"
CASTS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}  # numpy's cast to float16 is ten times as slow
Prints = dict[str, dict[str, int]]  # {path of the array: {dtype: checksum}}


def recording(params: tree.Params, found: Prints) -> tree.Params:
    """Returns the tree with leaves that add their fingerprints to `found` when they are read."""

    def leaf(path: str, value) -> Lazy:
        def read() -> np.ndarray:
            array = np.asarray(value.read() if isinstance(value, Lazy) else value)
            stored = {array.dtype.name: array.dtype} if array.dtype.itemsize <= 4 else {}
            with np.errstate(over="ignore"):  # infinite in both places
                dtypes = (stored | CASTS).items()
                found[path] = {name: fingerprint(array.astype(dtype, copy=False)) for name, dtype in dtypes}
            return array

        return Lazy(tuple(value.shape), np.dtype(value.dtype), read)

    leaves: dict[str, Any] = {path: leaf(path, value) for path, value in tree.flatten(params).items()}
    return tree.unflatten(leaves)


def recorded(folder: Path) -> dict[str, Prints]:
    """Returns the recorded fingerprints by network; empty for folders of earlier versions, which have none.

    Raises:
      WeightsError: if the file is damaged.
    """
    if not (folder / FILE).exists():
        return {}
    content = read_json(folder / FILE, "restore it, or remove it to load the model unverified")
    if not all(isinstance(x, dict) and all(isinstance(p, dict) for p in x.values()) for x in content.values()):
        raise WeightsError(f"{folder / FILE} is damaged: restore it, or remove it to load the model unverified")
    return content


def verify(params: tree.Params, prints: Prints, where: Path) -> None:
    """Compares loaded parameters with the fingerprints of their network.

    Args:
      params: nested dict of `jax.Array`.
      prints: an entry of `recorded`.
      where: the network's folder, for the error message.
    Raises:
      WeightsError: if an array is not what was saved.
    """
    flat = tree.flatten(params)
    flat = {k: x if x.dtype.name in prints.get(k, {}) else x.astype(np.float32) for k, x in flat.items()}
    # The host needs no compilation; only arrays that no process has whole are summed by their devices.
    whole = {k: x.is_fully_replicated and x.is_fully_addressable for k, x in flat.items()}
    found = {k: fingerprint(np.asarray(x.addressable_data(0))) for k, x in flat.items() if whole[k]}
    found |= checksums.fingerprints({k: x for k, x in flat.items() if not whole[k]})
    wrong = [k for k, value in found.items() if prints.get(k, {}).get(flat[k].dtype.name) != value]
    if wrong:
        raise WeightsError(
            f"{where} is damaged: {len(wrong)} of {len(found)} arrays are not what was saved, first {wrong[0]}; "
            "restore the folder from a copy, or convert the model again"
        )

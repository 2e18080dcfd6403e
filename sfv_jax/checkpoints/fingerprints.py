"""Fingerprints of the parameters of a model folder: the storage does not detect a flipped bit in stored numbers.

`fingerprints.json` contains, per network and array, the checksum that training checkpoints have (`run.fingerprints`)
for every dtype in which the array may be read. So arrays are verified as they arrive on the devices, cast and sharded.
"""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from sfv_jax.checkpoints import run
from sfv_jax.models import tree
from sfv_jax.weights.folders import WeightsError, read_json
from sfv_jax.weights.lazy import Lazy

FILE = "fingerprints.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_PART = 2**22  # elements that are summed at a time

Prints = dict[str, dict[str, int]]  # {path of the array: {dtype: checksum}}


def fingerprint(value: np.ndarray) -> int:
    """Returns the checksum that `run.fingerprints` computes on devices: bits times an odd weight, summed."""
    bits = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").reshape(-1)
    total = 0
    for start in range(0, bits.size, _PART):
        part = bits[start : start + _PART].astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.int64).astype(np.uint32)
        total += int((part * (2 * place + 1)).sum(dtype=np.uint32))
    return total % 2**32


def recording(params: tree.Params, found: Prints) -> tree.Params:
    """Returns the tree with leaves that add their fingerprints to `found` when they are read."""

    def leaf(path: str, value) -> Lazy:
        def read() -> np.ndarray:
            array = np.asarray(value.read() if isinstance(value, Lazy) else value)
            with np.errstate(over="ignore"):  # infinite in both places
                found[path] = {name: fingerprint(array.astype(dtype)) for name, dtype in DTYPES.items()}
            return array

        return Lazy(tuple(value.shape), np.dtype(value.dtype), read)

    return tree.unflatten({path: leaf(path, value) for path, value in tree.flatten(params).items()})


def recorded(folder: Path) -> dict[str, Prints]:
    """Returns the recorded fingerprints by network; empty for folders of earlier versions, which have none.

    Raises:
      WeightsError: if the file is damaged.
    """
    if not (folder / FILE).exists():
        return {}
    content = read_json(folder / FILE)
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
    known = jax.tree.map(lambda x: x if x.dtype.name in DTYPES else x.astype(np.float32), params)
    names = {path: x.dtype.name for path, x in tree.flatten(known).items()}
    found = {path.replace("/", "."): value for path, value in run.fingerprints(known).items()}
    wrong = [path for path, value in found.items() if prints.get(path, {}).get(names[path]) != value]
    if wrong:
        raise WeightsError(
            f"{where} is damaged: {len(wrong)} of {len(found)} arrays are not what was saved, first {wrong[0]}; "
            "restore the folder from a copy, or convert the model again"
        )

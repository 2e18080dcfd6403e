"""Writer of safetensors files, tensor by tensor: one array in memory at a time, complete files or none.

The format: 8 bytes with the length of the header (little endian), the header as JSON padded with spaces to a multiple
of 8, then the tensors' bytes in the order of their offsets. Our files equal those of the safetensors library byte for
byte.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from sfv_jax.runtime.files import replacing, write_json
from sfv_jax.weights.folders import WeightsError

Shapes = dict[str, tuple[int, ...]]  # in the order of the tensors in a file

_NAMES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_safetensors(
    path: Path,
    shapes: Shapes,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
    metadata: dict[str, str] | None = None,
    *,
    wide: Collection[str] = (),
) -> None:
    """Writes one file.

    Args:
      path: the file.
      shapes: shapes by name, in the order of the file.
      tensors: `(name, array)` for exactly the names of `shapes`, in their order; consumed one by one.
      dtype: float16 or float32, for all tensors but those of `wide`.
      metadata: strings for the header, in addition to torch's `{"format": "pt"}`.
      wide: names of tensors that are written in float32 regardless.
    Raises:
      WeightsError: if `dtype` cannot hold a value.
      ValueError: if `tensors` do not match `shapes`.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        dtypes = {name: np.dtype(np.float32) if name in wide else dtype for name in shapes}
        file.write(_header(shapes, dtypes, {"format": "pt"} | (metadata or {})))
        for (name, shape), (found, value) in zip(shapes.items(), tensors, strict=True):
            if (found, value.shape) != (name, tuple(shape)):
                raise ValueError(f"announced {name} {tuple(shape)}, got {found} {value.shape}")
            # numpy's stubs declare the buffer protocol for Python 3.12 and later only.
            file.write(_cast(name, value, dtypes[name]))  # pyrefly: ignore[bad-argument-type]


def _header(shapes: Shapes, dtypes: dict[str, np.dtype], metadata: dict[str, str]) -> bytes:
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, dtypes[name])
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _cast(name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below
        result = np.ascontiguousarray(value, dtype)
    if value.dtype != dtype and np.isinf(result).sum() > np.isinf(value).sum():
        raise WeightsError(f"{name} has values that {dtype} cannot hold: export without --fp16")
    return result


def write_weights(
    folder: Path,
    stem: str,
    shapes: Shapes,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> list[Path]:
    """Writes `STEM[.VARIANT].safetensors`, or shards and an index under the names that diffusers uses.

    Args:
      folder: an existing folder.
      stem: name up to the variant.
      shapes, tensors, dtype: as for `write_safetensors`.
      variant: suffix such as "fp16", or None.
      max_shard_size: most bytes of a file, a number or text such as "10GB"; a larger tensor has a shard of its own.
    Returns:
      The weight files.
    Raises:
      WeightsError: if `dtype` cannot hold a value, or `max_shard_size` is not a size.
      ValueError: if `tensors` do not match `shapes`.
    """
    shards = split(shapes, dtype, parse_size(max_shard_size))
    name = ".".join(filter(None, (stem, variant)))
    if len(shards) == 1:
        files = [f"{name}.safetensors"]
    else:
        files = [f"{name}-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    stream = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, (next(stream) for _ in shard), dtype)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_size(shape, dtype) for shape in shapes.values())},
            "weight_map": {k: file for file, shard in zip(files, shards, strict=True) for k in shard},
        }
        suffix = f".{variant}" if variant else ""
        write_json(folder / f"{stem}.safetensors.index{suffix}.json", index)
    return [folder / file for file in files]


def split(shapes: Shapes, dtype: np.dtype, limit: int) -> list[Shapes]:
    """Splits `shapes` into consecutive runs of at most `limit` bytes or of one tensor."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = _size(shape, dtype)
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


def parse_size(size: int | str) -> int:
    """Converts "10GB" (decimal, as on the hub), "500MB", "2GiB" or a number to bytes.

    Raises:
      WeightsError: if `size` is not a positive size.
    """
    text = str(size).strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if text.endswith(u)), "")
    try:
        number = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
        if not 1 <= number < math.inf:
            raise ValueError
    except ValueError:
        raise WeightsError(f"{size!r} is not a size: write it like 10GB or 500MB") from None
    return int(number)


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize

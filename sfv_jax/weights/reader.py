"""Strict reader of named tensors, one at a time: safetensors by our own code, pickles by torch on request.

A safetensors file is 8 bytes with the length of its header (little endian), the header as JSON, then the tensors.
Every header field is checked before it is used, and tensors are read, not mapped: memory holds one of them.
"""

import dataclasses
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from sfv_jax.runtime.files import MAX_JSON, parse_json
from sfv_jax.weights.folders import WeightsError, read_json

MAX_AXES = 32  # of a tensor
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
FLOATS = ("F64", "F32", "F16", "BF16")

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk.

    Attributes:
      file: the file that contains it.
      shape: its shape.
      dtype: code of the safetensors format, such as "F16".
      load: function that reads it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Tensors:
    """The tensors of one or several files by name.

    Attributes:
      files: the files that contain them, after their index if there is one.
      entries: the tensors by name.
      metadata: strings of the files' headers.
    """

    files: tuple[Path, ...]
    entries: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def names(self) -> list[str]:
        """Returns the names of the tensors."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        """Returns the code of the safetensors format, such as "F16"."""
        return self.entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor in the dtype of its file.

        Raises:
          WeightsError: if the file became shorter or unreadable since it was opened.
        """
        return self.entries[name].load()

    def renamed(self, names: dict[str, str]) -> "Tensors":
        """Selects and renames tensors; `names` is `{new name: present name}`."""
        return dataclasses.replace(self, entries={new: self.entries[old] for new, old in names.items()})

    def where(self) -> str:
        """Returns a description of the files for messages."""
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"


def open_weights(paths: str | Path | Iterable[str | Path], allow_pickle: bool = False) -> Tensors:
    """Opens a file, several files, or the shards listed in an `*.index*.json`; reads headers only.

    Args:
      paths: the file or files.
      allow_pickle: also read `.bin`, `.ckpt`, `.pt` and `.pth`, by torch with `weights_only=True`.
    Raises:
      WeightsError: if a file is absent, broken or malicious, is a pickle without `allow_pickle`, two files contain the
        same tensor, or an index contradicts its shards.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if len(files) == 1 and files[0].suffix == ".json":
        return _open_index(files[0], allow_pickle)
    entries: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found, strings = (_open_pickle if path.suffix in PICKLES else _open_safetensors)(_checked(path, allow_pickle))
        both = sorted(entries.keys() & found.keys())
        if both:
            raise WeightsError(f"{both[0]} is in two files: {entries[both[0]].file} and {path}")
        entries |= found
        metadata |= strings
    return Tensors(tuple(files), entries, metadata)


def _checked(path: Path, allow_pickle: bool) -> Path:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        what = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
        raise WeightsError(f"{path} {what}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not path.is_file():
        raise WeightsError(f"{path} is not a file{': it is a folder' if path.is_dir() else ''}")
    if status.st_size == 0:
        raise WeightsError(f"{path} is empty")
    if path.suffix in PICKLES and not allow_pickle:
        raise WeightsError(f"{path} can run code when it is loaded: pass --allow_pickle to read only its tensors")
    return path


def _open_index(path: Path, allow_pickle: bool) -> Tensors:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise WeightsError(f"{path} has no weight_map from tensors to files")
    for name, file in where.items():
        if not file or file in (".", "..") or re.search(r"[/\\]", file) or not file.isprintable():
            raise WeightsError(f"{path} looks for {name!r} outside its folder: {file!r}")
    shards = [path.with_name(file) for file in sorted(set(where.values()))]
    absent = [shard.name for shard in shards if not shard.exists() and not shard.is_symlink()]
    if absent:
        raise WeightsError(f"{path} names files that are not there: {', '.join(absent)}")
    tensors = open_weights(shards, allow_pickle)
    for name, file in where.items():
        if name not in tensors.entries:
            raise WeightsError(f"{path} lists {name!r} in {file}, but it is not there")
        if tensors.entries[name].file.name != file:
            raise WeightsError(f"{path} lists {name!r} in {file}, but it is in {tensors.entries[name].file.name}")
    surplus = sorted(tensors.entries.keys() - where.keys())
    if surplus:
        raise WeightsError(f"{path} does not list {surplus[0]}, which is in {tensors.entries[surplus[0]].file.name}")
    return dataclasses.replace(tensors, files=(path, *tensors.files))


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length > MAX_JSON:
            raise WeightsError(f"{path} is not a safetensors file: its header would have {length:,} bytes")
        if size < 8 or length > size - 8:
            raise WeightsError(f"{path} is cut short: it has {size:,} bytes, not even a whole header")
        header = _header(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has a broken header: __metadata__ must hold strings")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    _refuse_overlaps(path, spans, size - 8 - length)
    entries = {}
    for name, (start, _) in spans.items():
        shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
        entries[name] = Tensor(path, shape, dtype, _loader(path, 8 + length + start, shape, DTYPES[dtype]))
    return entries, metadata


def _header(path: Path, text: bytes) -> dict:
    try:
        return parse_json(text)
    except ValueError as error:
        raise WeightsError(f"{path} is not a safetensors file: its header is no JSON object ({error})") from error


def _span(path: Path, name: str, entry) -> tuple[int, int]:
    """Returns the first and last byte (exclusive) of a tensor, counted from the end of the header."""

    def broken(why: str) -> WeightsError:
        return WeightsError(f"{path} has a broken header: tensor {name!r} {why}")

    if not name.isprintable():
        raise broken("has a name that cannot be printed")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise broken("lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken(f"is of unknown dtype {dtype!r}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"has shape {shape!r} and offsets {offsets!r}")
    if len(shape) > MAX_AXES:
        raise broken(f"has {len(shape)} axes, more than {MAX_AXES}")
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        raise broken(f"has offsets {offsets}, but shape {shape} of {dtype} takes {size} bytes")
    if math.prod(n or 1 for n in shape) >= 2**60:
        raise broken(f"has shape {shape}, which no array has")
    return offsets[0], offsets[1]


def _whole(numbers) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _refuse_overlaps(path: Path, spans: dict[str, tuple[int, int]], size: int) -> None:
    """Raises WeightsError unless the tensors fill the file without overlap or gap."""
    end, before = 0, ""
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:
            raise WeightsError(f"{path} has a broken header: tensors {before!r} and {name!r} overlap")
        if start > end:
            raise WeightsError(f"{path} has a broken header: {start - end} bytes before tensor {name!r} belong to none")
        end, before = stop, name
    if end > size:
        raise WeightsError(f"{path} is cut short: tensor {before!r} ends {end - size:,} bytes behind its end")
    if end < size:
        raise WeightsError(f"{path} has {size - end:,} bytes behind its last tensor that belong to none")


def _loader(path: Path, start: int, shape: tuple[int, ...], dtype: type) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        count = math.prod(shape)
        try:
            with path.open("rb") as file:
                file.seek(start)
                value = np.fromfile(file, dtype, count)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
        if value.size != count:
            raise WeightsError(f"{path} became shorter while it was read")
        return value.reshape(shape)

    return load


def _open_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(f"{path} needs torch to be read: pip install torch, or get a safetensors file") from error
    if is_torchscript(path):
        raise WeightsError(f"{path} is TorchScript, a program, and was not loaded: get a file of tensors")
    try:
        content = _load_pickle(torch, path)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds more than tensors and was not loaded: it may run code") from error
    except Exception as error:  # damaged files make torch raise errors of many kinds
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise WeightsError(f"{path} is cut short or not a file of torch ({reason})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds no state dict")
    wrong = [name for name, x in content.items() if not isinstance(name, str) or not isinstance(x, torch.Tensor)]
    if wrong:
        raise WeightsError(f"{path} holds something else than tensors: {', '.join(map(repr, wrong[:3]))}")
    codes = {getattr(torch, np.dtype(kind).name, None): code for code, kind in DTYPES.items()}
    codes |= {torch.bool: "BOOL"}
    for name, x in content.items():
        if problem := _unusable(torch, name, x, codes):
            raise WeightsError(f"{path}: {name!r} {problem}")
    entries = {name: Tensor(path, tuple(x.shape), codes[x.dtype], _unpickler(torch, x)) for name, x in content.items()}
    return entries, {}


def is_torchscript(path: Path) -> bool:
    """Returns whether `path` is a TorchScript archive, which contains code besides tensors.

    Raises:
      WeightsError: if it is an archive whose list of files is damaged.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise WeightsError(f"{path} is cut short or damaged: {error}") from error


def _unusable(torch, name: str, x, codes: dict) -> str | None:
    """Returns why a tensor of a pickle cannot be read as an array; None if it can."""
    if not name.isprintable():
        return "has a name that cannot be printed"
    if x.layout != torch.strided or x.is_nested:
        return f"is no plain array, but {'nested' if x.is_nested else x.layout}"
    if x.device.type != "cpu":
        return f"has no values here: it is on the device {x.device}"
    if x.dtype not in codes:
        return f"is of unknown dtype {x.dtype}"
    if x.dim() > MAX_AXES or x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return f"has shape {tuple(x.shape)}, but fewer numbers are stored"
    return None


def _load_pickle(torch, path: Path):
    """Loads tensors only, mapped from the file where the format allows it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpickler(torch, x) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        value = x.detach().resolve_neg().contiguous()
        if value.dtype == torch.bfloat16:  # numpy has no such dtype
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    return load

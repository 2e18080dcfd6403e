"""What all readers and writers of weights share: one error, and files that are complete or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WeightsError(ValueError):
    """Weights or a model folder that cannot be used as they are; the message says what is wrong and what to do."""


def shape_problems(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """One line for every name that is missing, unexpected or of another shape; empty if all is well."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"unexpected: {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            lines.append(f"misshapen: {name} is {found[name]}, expected {expected[name]}")
    return sorted(lines)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises WeightsError if `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already: choose another destination or pass --overwrite")


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty hidden folder next to `path`, which takes the name `path` when the block ends without an error.

    Raises:
      WeightsError: if `path` exists and `overwrite` is not set. With `overwrite` the old folder stays until the end.
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite)
    partial, old = (path.with_name(f".{path.name}.{suffix}-{os.getpid()}") for suffix in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises WeightsError if it is missing or not one."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return data


def write_json(path: Path, data: dict) -> None:
    """Writes `data` at once or not at all, in the format of the libraries' own files."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    partial.rename(path)

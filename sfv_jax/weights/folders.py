"""Shared parts of all readers and writers of weights: one error class, and folders that are complete or absent."""

import glob
import json
import os
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sfv_jax.errors import UserError
from sfv_jax.runtime.platforms import is_alive


class WeightsError(UserError):
    """Unusable weights or model folder; the message gives the cause and the remedy."""


def shape_problems(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Returns one sorted line per missing, unexpected or misshapen name; empty if `found` equals `expected`."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"unexpected: {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            lines.append(f"misshapen: {name} is {found[name]}, expected {expected[name]}")
    return sorted(lines)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises WeightsError if `path` exists and `overwrite` is not set."""
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already: choose another destination or pass --overwrite")


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Generator[Path, None, None]:
    """Yields an empty hidden folder next to `path`, and renames it to `path` if the block ends without an error.

    Args:
      path: the final name.
      overwrite: replace an existing `path`; the old folder remains until the new one is complete.
    Raises:
      WeightsError: if `path` exists and `overwrite` is not set.
    """
    path = Path(path).absolute()
    _clear_remains(path)
    refuse_existing(path, overwrite)
    process = f"{socket.gethostname()}-{os.getpid()}"
    partial, old = (path.with_name(f".{path.name}.{suffix}-{process}") for suffix in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _clear_remains(path: Path) -> None:
    """Removes folders that killed processes of this machine left beside `path`; restores a folder being replaced."""
    for suffix in ("old", "partial"):
        start = f".{path.name}.{suffix}-{socket.gethostname()}-"
        for left in path.parent.glob(f"{glob.escape(start)}*"):
            process = left.name.removeprefix(start)
            if not process.isdigit() or is_alive(int(process)):
                continue
            if suffix == "old" and not path.exists():
                left.rename(path)
            else:
                shutil.rmtree(left, ignore_errors=True)


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file.

    Raises:
      WeightsError: if the file is missing or contains anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return data

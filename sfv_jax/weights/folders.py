"""Folders that are either complete or absent, and the identity of files."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WeightsError(ValueError):
    """Weights or a model folder that cannot be used as they are; the message says what is wrong and what to do."""


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

"""Shared parts of all readers and writers of weights: one error class, and folders that are complete or absent."""

import glob
import os
import shutil
import socket
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from sfv_jax.errors import UserError
from sfv_jax.runtime import files as parsers
from sfv_jax.runtime.files import MAX_JSON, FileError, one_line, replacing, sha256
from sfv_jax.runtime.platforms import is_alive

SUMS = "SHA256SUMS"  # checksums of an exported folder
MAX_LINE = 2000  # characters of a line of an error message


class WeightsError(UserError):
    """Unusable weights or model folder; the message gives the cause and the remedy.

    Messages contain names and values of files that may be hostile: every line is made printable and cut.
    """

    def __init__(self, message: str):
        super().__init__("\n".join(map(printable, message.split("\n"))))


def printable(text: object) -> str:
    """Returns one line of at most `MAX_LINE` characters, with escapes for control characters and line ends."""
    line = str(text)
    line = line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 4 :]}"
    return one_line(line)


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


def read_json(path: Path, remedy: str = "copy, download or convert it again") -> dict:
    """Reads a JSON object as `runtime.files.read_json` does, but raises WeightsError if it is unusable."""
    try:
        return parsers.read_json(path, remedy)
    except FileError as error:
        raise WeightsError(str(error)) from error


# Checksums of exported files, in the format of the program sha256sum.


def write_sums(place: Path, files: Iterable[Path]) -> None:
    """Writes the SHA-256 of `files`, which are in the folder of `place` or below, to the file `place`."""
    lines = [f"{sha256(file)}  {file.relative_to(place.parent).as_posix()}\n" for file in sorted(files)]
    with replacing(place) as temporary:
        temporary.write_text("".join(lines))


def sums_of(source: Path) -> Path:
    """Returns where `write_sums` puts the checksums of an exported folder or file."""
    return source / SUMS if source.is_dir() else source.with_name(f"{source.name}.sha256")


def check_sums(source: Path, digests: Mapping[Path, str]) -> None:
    """Compares SHA-256 digests of files with those that were written beside them, if there are any.

    Args:
      source: the folder or file that was exported.
      digests: digests by file.
    Raises:
      WeightsError: if a file is not what was written, or the checksums cannot be read.
    """
    place = sums_of(source)
    if not place.is_file():
        return
    with place.open("rb") as file:
        lines = file.read(MAX_JSON).decode(errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for file, digest in digests.items():
        name = file.relative_to(place.parent).as_posix() if file.is_relative_to(place.parent) else ""
        if sums.get(name, digest) != digest:
            again = f"copy it again, or remove {place.name} to read it as it is"
            raise WeightsError(f"{file} is not what was written: its SHA-256 is another than in {place}; {again}")

"""Files that appear under their final name only when they are complete, and checksums of files."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from sfv_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path next to `path`; renames it to `path` on success, deletes it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes `content` to `path` as JSON, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def check_folder(folder: Path, given: str) -> None:
    """Checks that a folder for results exists or can be made, and takes files: before the work, not after it.

    Args:
      folder: the folder.
      given: the flag and its value, for the message, such as "--out=scores".
    Raises:
      UserError: if it is no folder, or no file can be written there.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=there):  # the only proof: access rights do not show a read-only or full disk
            pass
    except OSError as error:
        cause = f"takes no files: {error.strerror}" if there.is_dir() else "is no folder"
        raise UserError(f"{one_line(given)} cannot be written: {one_line(there)} {cause}") from error


def check_file(path: Path, given: str) -> None:
    """Checks that a file for results can be written or replaced: before the work, not after it.

    Args:
      path: the file.
      given: as for `check_folder`.
    Raises:
      UserError: if it is a folder, or no file can be written to its folder.
    """
    if path.is_dir():
        raise UserError(f"{one_line(given)} is a folder: name a file")
    check_folder(path.parent, given)


def is_alive(process: int) -> bool:
    """Returns whether a process with this number exists on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256(path: Path, done: Callable[[int], None] = lambda count: None) -> str:
    """Returns the hexadecimal SHA-256 of a file; calls `done` with the number of bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()


def one_line(text: object) -> str:
    r"""Returns a path or text with everything unprintable escaped: line ends, escape codes, bytes not in UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))

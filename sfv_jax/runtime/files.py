"""Files that appear under their final name only when they are complete and on the disk; JSON and checksums of files."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from sfv_jax.errors import UserError


class FileError(UserError):
    """File without the content that it should have; the message gives the cause and the remedy."""


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path next to `path`; on success renames it to `path`, on failure deletes it.

    The content is on the disk before the rename: after a power failure `path` has the old content or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may have the same number and write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Waits until the content of a file, or the list of a folder's files, is on the disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:  # cannot be opened
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do this for files only.
        if not folder or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Writes `content` to `path` as JSON, completely or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, remedy: str, fields: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      remedy: what to do if it is unusable, for the message.
      fields: names of fields that must be there.

    Raises:
      FileError: if the file is missing, empty, cut off, not UTF-8 text or not a JSON object, or lacks fields.
    """
    try:
        text = path.read_bytes().decode()
        content = json.loads(text) if text.strip("\0 \r\n\t") else ""
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        problem = f"is cut off or not JSON ({error})"
    else:
        missing = [name for name in fields if not isinstance(content, dict) or name not in content]
        if isinstance(content, dict) and not missing:
            return content
        problem = f"has no {', '.join(missing)}" if isinstance(content, dict) else "is not a JSON object"
        problem = "is empty" if content == "" else problem
    raise FileError(f"{path}: {problem}; {remedy}")


def free_name(path: Path) -> Path:
    """Returns `path`, extended by as many "_" as it takes for a name that nothing has."""
    while os.path.lexists(path):
        path = path.with_name(path.name + "_")
    return path


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

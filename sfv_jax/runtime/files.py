"""Files that appear under their final name only when they are complete and on the disk; JSON and checksums of files."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from sfv_jax.errors import UserError
from sfv_jax.runtime.platforms import is_alive, place

MAX_JSON = 2**24  # bytes of JSON; the header of SVD's own file has 0.4 MB
MAX_LIST = 2**30  # bytes of JSON that lists all clips of a dataset
DAY = 24 * 3600.0  # seconds
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp")  # what `replacing` writes
PART = 16  # least bytes of JSON per value, on average, which bound the memory of the values


class FileError(UserError):
    """File without the content that it should have; the message gives the cause and the remedy."""


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path next to `path`; on success renames it to `path`, on failure deletes it.

    The content is on the disk before the rename: after a power failure `path` has the old content or the new one. What
    killed processes left in the folder is removed when a process first writes there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _cleared:
        _cleared.add(path.parent)
        clear_abandoned(path.parent)
    # Processes on several machines may have the same number and write the same file.
    temporary = path.with_name(f".{path.name}.{_here()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


_cleared: set[Path] = set()  # folders


@functools.cache
def _here() -> str:
    return hashlib.sha256(place().encode()).hexdigest()[:8]


def clear_abandoned(folder: Path) -> None:
    """Removes temporary files of `replacing` whose process is gone, and those of other machines that are a day old."""
    try:
        names = list(folder.iterdir())
    except OSError:  # it can be written, but not listed
        return
    for path in names:
        if (found := TEMPORARY.fullmatch(path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # the process may have ended now; files of others are left alone
            gone = not is_alive(int(found[2])) if found[1] == _here() else time.time() - path.stat().st_mtime > DAY
            if gone:
                path.unlink()


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


def read_json(path: Path, remedy: str, fields: Iterable[str] = (), most: int = MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.
      remedy: what to do if it is unusable, for the message.
      fields: names of fields that must be there.
      most: bytes, as for `parse_json`.

    Raises:
      FileError: if the file is missing or not regular, `parse_json` refuses its content, or fields are missing.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise FileError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}; {remedy}")
        with path.open("rb") as file:
            content = parse_json(file.read(most + 1), most)
        if missing := [name for name in fields if name not in content]:
            raise ValueError(f"it has no {', '.join(missing)}")
    except FileError:
        raise
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist; {remedy}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}; {remedy}") from error
    except ValueError as error:
        raise FileError(f"{path} cannot be used: {error}; {remedy}") from error
    return content


def parse_json(text: bytes, most: int = MAX_JSON) -> dict[str, Any]:
    """Parses a JSON object in time and memory that its length bounds.

    Args:
      text: the object in UTF-8.
      most: greatest length in bytes; one part, which is a comma or an opening bracket, may be there for `PART` of them.
    Raises:
      ValueError: if `text` is empty, too large or cut off, contains a name twice or a number that JSON lacks (NaN), or
        is not an object.
    """
    if len(text) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    if sum(map(text.count, (b",", b"[", b"{"))) > most // PART:
        raise ValueError(f"it has more than {most // PART:,} parts")
    if not text.strip(b"\0 \r\n\t"):  # zeros: as after a power failure
        raise ValueError("it is empty")
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is cut off or not JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has {twice!r} twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it contains {name}")


def read_arrays(path: Path, remedy: str, names: Iterable[str] = ()) -> dict[str, Any]:
    """Reads all arrays of an .npz file.

    Args:
      path: the file.
      remedy: what to do if it is unusable, for the message.
      names: names of arrays that must be there.
    Raises:
      FileError: if the file is missing or damaged, or lacks arrays.
    """
    import numpy as np

    try:
        with path.open("rb") as opened, np.load(opened) as file:  # np.load alone leaves a damaged file open
            arrays = {name: file[name] for name in file.files}
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"it has no {', '.join(missing)}")
    except Exception as error:  # of every kind, as zip, its compression and numpy's headers may be damaged
        cause = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise FileError(f"{path} cannot be used: {cause}; {remedy}") from error
    return arrays


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


def in_markdown(text: object) -> str:
    r"""Returns a path or text as one line of Markdown that shows it: a backslash before what Markdown would interpret.

    That is what begins HTML, entities, code, emphasis, links and columns of tables anywhere, and what begins a heading,
    list, quotation or line at the start.
    """
    escaped = re.sub(r"[\\`*|]|<(?=[\w/!?])|&(?=[\w#])|\](?=[(\[:])", r"\\\g<0>", one_line(text))
    return re.sub(r"^( *\d*)([.)+-](?= |$)|#+(?= |$)|>|[-=]+ *$|~~~)", r"\1\\\2", escaped)


def in_code(text: object) -> str:
    """Returns a path or text as inline code of Markdown, in one line."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"

"""Files that appear under their final name only when they are complete, and checksums of files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path


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

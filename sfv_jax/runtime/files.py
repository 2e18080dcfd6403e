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


def sha256(path: Path, done: Callable[[int], None] = lambda count: None) -> str:
    """Returns the hexadecimal SHA-256 of a file; calls `done` with the number of bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()

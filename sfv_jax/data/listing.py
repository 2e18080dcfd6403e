"""The one rule by which all commands list files: which files of a folder count, and in what order."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import one_line

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")


class ListingError(UserError):
    """Folder that cannot be listed; the message is one line with the folder and the cause."""


def list_videos(folder: str | os.PathLike) -> list[Path]:
    """Returns the videos under `folder`, see `list_files`."""
    return list_files(folder, VIDEO_SUFFIXES)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Returns the images under `folder`, see `list_files`."""
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: str | os.PathLike, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the regular files under a folder with one of some suffixes, in any case of letters.

    Subfolders are searched too, also those that are links, but no folder inside itself. Names that begin with a dot are
    skipped, folders and files, with them the `._NAME` files that macOS leaves on foreign disks. The order is that of
    the paths, compared name by name and letter by letter by code point.

    Args:
      folder: the folder; its own name may begin with a dot.
      suffixes: lower-case suffixes with their dots.
    Raises:
      ListingError: if `folder` or a folder in it is no folder or cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ListingError(f"{one_line(folder)}: not a directory")
    return sorted(path for path in _files(folder, frozenset()) if path.suffix.lower() in suffixes)


def _files(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields the regular files below `folder` that are not hidden; `above` identifies the folders around it."""
    try:
        about = folder.stat()
        here = (about.st_dev, about.st_ino)
        entries = [] if here in above else [(path, _mode(path)) for path in folder.iterdir()]
    except OSError as error:
        raise ListingError(f"{one_line(folder)}: cannot list the folder: {error.strerror}") from error
    for path, mode in entries:
        if path.name.startswith("."):
            continue
        if stat.S_ISDIR(mode):
            yield from _files(path, above | {here})
        elif stat.S_ISREG(mode):
            yield path


def _mode(path: Path) -> int:
    """Returns the mode of a file; 0 for links that lead nowhere or in a circle, and files deleted meanwhile."""
    try:
        return path.stat().st_mode
    except PermissionError:
        raise
    except OSError:
        return 0

"""The one rule by which all commands list files: which files of a folder count, and in what order."""

import os
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
    return sorted(path for path in _files(folder, frozenset()) if path.suffix.lower() in suffixes and path.is_file())


def _files(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields everything below `folder` that is not hidden and no folder; `above` identifies the folders around it."""
    try:
        about = folder.stat()
        entries = list(folder.iterdir())
    except OSError as error:
        raise ListingError(f"{one_line(folder)}: cannot list the folder: {error.strerror}") from error
    here = (about.st_dev, about.st_ino)
    if here in above:
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, above | {here})
        else:
            yield path

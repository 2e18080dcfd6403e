"""Folders of videos to be scored: which clips there are, what belongs together, which cannot be read.

A subfolder is a group (a method, say); clips of one name in several groups show the same condition. A name that ends in
`-seed3` is that of one of several videos of a condition.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sfv_jax.data.ucf101_tfds import Recorded
from sfv_jax.data.video import VideoError, list_videos, read_clip, read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SEED = re.compile(r"^(.+)-seed(\d+)$")


@dataclass(frozen=True)
class Clip:
    """A file; `group` is its subfolder ("" without), `name` its path in there without suffix and seed.

    Or a video of a prepared dataset, which has no file of its own.
    """

    path: Path | Recorded
    group: str
    name: str
    seed: int | None  # None if the name has none

    def read(self, num_frames: int, fps: float = 7.0) -> np.ndarray:
        """uint8 `[t, h, w, 3]` from the start; see `data.video.read_clip`. Raises VideoError."""
        if isinstance(self.path, Recorded):
            return self.path.read(num_frames, fps)
        return read_clip(self.path, num_frames, fps)


@dataclass
class Reading:
    """How clips are read, and what became of those that could not be.

    Frames are those on screen at k / `fps` seconds, k < `num_frames`; see `data.video.read_clip`.
    """

    num_frames: int = 14
    fps: float = 7.0
    unreadable: list[str] = field(default_factory=list)  # one line each: the file and what is wrong with it

    def frames(self, clips: list[Clip], threads: int = 2) -> Iterator[tuple[Clip, np.ndarray]]:
        """Yields (clip, uint8 `[t, h, w, 3]`) in order, a few decoded ahead; notes unreadable ones and goes on."""
        with ThreadPoolExecutor(threads) as pool:
            ahead = 2 * threads
            pending = [pool.submit(self._read, clip) for clip in clips[:ahead]]
            for n, clip in enumerate(clips):
                try:
                    yield clip, pending[n].result()
                except VideoError as error:
                    self.unreadable.append(str(error))
                pending[n] = None  # decoded clips are large
                pending += [pool.submit(self._read, more) for more in clips[n + ahead : n + ahead + 1]]

    def _read(self, clip: Clip) -> np.ndarray:
        return clip.read(self.num_frames, self.fps)


def find_clips(folder: str | Path) -> list[Clip]:
    """The clips under `folder`, sorted by group, name and seed.

    Raises:
      VideoError: if it is no folder or holds no video, or if two files would be the same clip.
    """
    folder, clips = Path(folder), []
    for path in list_videos(folder):
        group, *rest = path.relative_to(folder).with_suffix("").parts
        group, stem = (group, "/".join(rest)) if rest else ("", group)
        name, seed = _SEED.match(stem).groups() if _SEED.match(stem) else (stem, None)
        clips.append(Clip(path, group, name, None if seed is None else int(seed)))
    if not clips:
        raise VideoError(f"{folder} holds no video file")
    by_key = {}
    for clip in clips:
        other = by_key.setdefault((clip.group, clip.name, clip.seed), clip)
        if other is not clip:
            raise VideoError(f"{other.path} and {clip.path} have one name: which one counts?")
    return sorted(clips, key=lambda c: (c.group, c.name, -1 if c.seed is None else c.seed))


def condition_images(folder: str | Path, names: set[str]) -> dict[str, np.ndarray]:
    """uint8 `[h, w, 3]` by clip name: images of those names in `folder`, or first frames of videos of those names.

    Raises:
      VideoError: naming those that are missing or cannot be read.
    """
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise VideoError(f"{folder}: not a directory")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in names and path.suffix.lower() in IMAGE_SUFFIXES:
            found[name] = read_image(path)
    for path in list_videos(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in names and name not in found:
            found[name] = read_clip(path, num_frames=1)[0]
    missing = sorted(names - found.keys())
    if missing:
        raise VideoError(f"{folder} has no condition image for {len(missing)} clips: {', '.join(missing[:5])}")
    return found

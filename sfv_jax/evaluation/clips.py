"""Folders of videos to score: their clips, groups and conditions, and the files that cannot be read.

A subfolder is a group (a method, say); clips of one name in several groups have the same condition. `-seed3` at the end
of a name marks one of several videos from the same condition.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.data.images import ImageError, read_image
from sfv_jax.data.listing import IMAGE_SUFFIXES, list_images, list_videos
from sfv_jax.data.ucf101_tfds import Recorded
from sfv_jax.data.video import VideoError, read_clip
from sfv_jax.runtime.files import one_line

FILES: dict[str, Any] = {"form": "video files"}  # default `Dataset.source`
Each = Callable[[np.ndarray], np.ndarray]
_SEED = re.compile(r"^(.+)-seed(\d+)$")


@dataclass(frozen=True)
class Clip:
    """A video to score.

    Attributes:
      path: its file, or its record in a prepared dataset.
      group: its subfolder; "" if it has none.
      name: its path in the subfolder without suffix and seed.
      seed: the seed in its name, or None.
    """

    path: Path | Recorded
    group: str
    name: str
    seed: int | None

    def read(self, num_frames: int, fps: float = 7.0, each: Each = lambda frame: frame) -> np.ndarray:
        """Reads uint8 `[t, h, w, 3]` from the start; see `data.video.read_clip`.

        Raises:
          VideoError: if the video cannot be read or is too short.
        """
        if isinstance(self.path, Recorded):
            return np.stack([each(frame) for frame in self.path.read(num_frames, fps)])
        return read_clip(self.path, num_frames, fps, each=each)


@dataclass(frozen=True)
class Dataset:
    """Real clips to compare with.

    Attributes:
      clips: the clips.
      name: their name in titles and messages.
      source: JSON description of the files they are read from, for records.
    """

    clips: list[Clip]
    name: str
    source: dict[str, Any] = field(default_factory=FILES.copy)


@dataclass
class Reading:
    """Reader of the frames on screen at k / `fps` seconds, k < `num_frames`; see `data.video.read_clip`.

    Attributes:
      num_frames, fps: frames of a clip and their rate.
      each: function of a frame uint8 `[h, w, 3]`, to shrink frames as they come.
      unreadable: one line for each unreadable clip so far, with the file and the reason.
    """

    num_frames: int = 14
    fps: float = 7.0
    each: Each = lambda frame: frame
    unreadable: list[str] = field(default_factory=list)

    def frames(self, clips: list[Clip], threads: int = 2) -> Iterator[tuple[Clip, np.ndarray]]:
        """Yields (clip, uint8 `[t, h, w, 3]`) in order, decoding a few ahead; skips and lists unreadable clips."""
        with ThreadPoolExecutor(threads) as pool:
            ahead = 2 * threads
            pending = deque(pool.submit(self._read, clip) for clip in clips[:ahead])
            for n, clip in enumerate(clips):
                try:
                    yield clip, pending.popleft().result()
                except VideoError as error:
                    self.unreadable.append(str(error))
                pending.extend(pool.submit(self._read, more) for more in clips[n + ahead : n + ahead + 1])

    def _read(self, clip: Clip) -> np.ndarray:
        return clip.read(self.num_frames, self.fps, self.each)


def find_clips(folder: str | Path) -> list[Clip]:
    """Returns the clips under `folder`, sorted by group, name and seed.

    Raises:
      VideoError: if `folder` is not a folder or contains no video, or two files would be the same clip.
    """
    folder, clips = Path(folder), []
    for path in list_videos(folder):
        group, *rest = path.relative_to(folder).with_suffix("").parts
        group, stem = (group, "/".join(rest)) if rest else ("", group)
        match = _SEED.match(stem)
        name, seed = match.groups() if match else (stem, None)
        clips.append(Clip(path, group, name, None if seed is None else int(seed)))
    if not clips:
        raise VideoError(f"{one_line(folder)} holds no video file")
    by_key = {}
    for clip in clips:
        other = by_key.setdefault((clip.group, clip.name, clip.seed), clip)
        if other is not clip:
            raise VideoError(f"{one_line(other.path)} and {one_line(clip.path)} have one name: which one counts?")
    return sorted(clips, key=lambda c: (c.group, c.name, -1 if c.seed is None else c.seed))


def condition_images(folder: str | Path, names: set[str]) -> dict[str, np.ndarray]:
    """Reads condition images from `folder`: images, or first frames of videos, under the names of the clips.

    Returns:
      `{name: uint8 [h, w, 3]}`.
    Raises:
      VideoError: if images are missing, cannot be read or have one name; names all of them.
    """
    folder, files, problems = Path(folder), {}, []
    for path in (*list_images(folder), *list_videos(folder)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        other = files.setdefault(name, path) if name in names else path
        if other is not path and path.suffix.lower() in IMAGE_SUFFIXES:  # an image goes before a video
            problems.append(f"{one_line(other)} and {one_line(path)} have one name: which one counts?")
    found = {}
    for name, path in files.items():
        try:
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            found[name] = read_image(path) if is_image else read_clip(path, num_frames=1)[0]
        except (ImageError, VideoError) as error:
            problems.append(str(error))
    if missing := sorted(names - files.keys()):
        problems.append(
            f"{one_line(folder)} has no condition image for {len(missing)} clips: {one_line(', '.join(missing))}"
        )
    if problems:
        raise VideoError("\n  ".join(problems))
    return found

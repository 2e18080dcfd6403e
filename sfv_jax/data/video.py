"""Readers and writers of video files (PyAV and Pillow). Frames are uint8 RGB, channels last."""

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from sfv_jax.data import decoding
from sfv_jax.data.colors import to_rgb
from sfv_jax.data.images import fitted
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import one_line, replacing

_BT709 = 1


class VideoError(UserError):
    """Unusable file; the message is one line with the file and the cause."""


def duration(path: str | os.PathLike) -> float:
    """Returns the length of a video in seconds, without its sound; 0.0 if it has no frames.

    It is that of the header of the video stream; if the header lacks it, the whole file is read.

    Raises:
      VideoError: if the file is missing, corrupt or has no video stream.
    """
    with _naming(path):
        return decoding.duration(Path(path))


def read_clip(
    path: str | os.PathLike,
    num_frames: int = 14,
    fps: float = 7.0,
    start: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    fit: str = "crop",
    each: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
) -> np.ndarray:
    """Reads a clip at a fixed rate. Damage of its frames that a player would hide is an error here.

    Args:
      path: the file.
      num_frames: number of frames.
      fps: rate of the frames. Frame k is the one on screen at `start + k / fps` seconds by timestamp, so the rate of
        the file does not matter and may vary.
      start: beginning of the clip in seconds.
      height, width: size of the frames; None for both keeps that of the clip's first frame.
      fit: how frames of another shape are brought to that size, see `images.fitted`.
      each: function of such a frame uint8 `[h, w, 3]`, applied as the frames come: no clip is in memory at the size of
        the file if `height` and `width` or this function shrink it.
    Returns:
      uint8 `[t, h, w, 3]` RGB.
    Raises:
      ValueError: if only one of `height` and `width` is given.
      VideoError: if the file cannot be read, for whatever reason, has no video stream or is too short.
    """
    if (height is None) != (width is None):
        raise ValueError("give both height and width, or neither")

    def converter(aspect: float) -> Callable[[av.VideoFrame], np.ndarray]:
        size = None if height is None or width is None else (height, width)

        def convert(frame: av.VideoFrame) -> np.ndarray:
            nonlocal size
            rgb = to_rgb(frame, aspect)
            size = size or (rgb.shape[0], rgb.shape[1])  # it may change amid a video
            return each(fitted(rgb, *size, fit))

        return convert

    with _naming(path):
        frames = decoding.frames_on_screen(Path(path), start, np.arange(num_frames) / fps, converter)
        if len(frames) < num_frames:
            have = f"{len(frames)} of {num_frames} frames at {fps:g} fps from {start:g} s"
            raise VideoError(f"{one_line(path)}: too short: {have}")
        return np.stack(frames)


def write_video(
    path: str | os.PathLike, frames: np.ndarray | Iterable[np.ndarray], fps: float = 7.0, comment: str = ""
) -> None:
    """Writes frames as .mp4, .gif, .webp or .png (all frames side by side), complete or not at all.

    Frames that come one after another are encoded as they come in an mp4; the other formats need all of them first.
    Missing folders are created. mp4 is H.264 with BT.709 color, which needs even sides: the last row or column of an
    odd side is repeated.

    Args:
      path: the file; its suffix selects the format.
      frames: uint8 `[t, h, w, 3]` RGB, or an iterable of frames uint8 `[h, w, 3]`.
      fps: frames per second.
      comment: text that an .mp4 contains as its comment, see `read_comment`; other formats omit it.
    Raises:
      UserError: if the suffix is unknown.
      ValueError: if `frames` have another shape or dtype.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(_WRITERS)}")
    if not isinstance(frames, np.ndarray) and writer is not _write_mp4:
        frames = np.stack(list(frames))
    if isinstance(frames, np.ndarray) and (
        frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape
    ):
        raise ValueError(f"{path}: frames must be uint8 [t, h, w, 3], got {frames.dtype} {list(frames.shape)}")
    with replacing(path) as temporary:
        writer(temporary, frames, fps, comment)


def read_comment(path: str | os.PathLike) -> str:
    """Returns the comment of an .mp4, "" if it has none.

    Raises:
      VideoError: if the file cannot be read.
    """
    with _naming(path), av.open(f"file:{Path(path)}") as container:
        return container.metadata.get("comment", "")


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Generator[None, None, None]:
    """Turns every error into a VideoError: what a damaged file makes a library raise is not predictable."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"{one_line(path)}: cannot read the video: {one_line(_reason(error))}") from error


def _reason(error: Exception) -> str:
    """Returns the cause in one line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float, comment: str) -> None:
    coming = iter(frames)
    first = next(coming)
    h, w, _ = first.shape
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width, stream.pix_fmt = h + h % 2, w + w % 2, "yuv420p"
        stream.options = {"crf": "16"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for rgb in itertools.chain([first], coming):
            even = np.pad(rgb, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: np.ndarray, fps: float, kind: str, tick: int, **options) -> None:
    # Durations are multiples of `tick` milliseconds; rounding times instead of durations preserves the rate.
    times = np.round(np.arange(len(frames) + 1) * 1000 / fps / tick).astype(int) * tick
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, kind, save_all=True, append_images=rest, duration=np.diff(times).tolist(), loop=0, **options)


def _write_gif(path: Path, frames: np.ndarray, fps: float, _: str) -> None:
    _write_animation(path, frames, fps, "GIF", tick=10)


def _write_webp(path: Path, frames: np.ndarray, fps: float, _: str) -> None:
    _write_animation(path, frames, fps, "WEBP", tick=1, quality=90)


def _write_strip(path: Path, frames: np.ndarray, *_) -> None:  # a still image has no rate
    Image.fromarray(np.concatenate(frames, axis=1)).save(path, "PNG")


_WRITERS: dict[str, Callable[[Path, Any, float, str], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_strip,
}

"""Readers and writers of video files (PyAV and Pillow). Frames are uint8 RGB, channels last."""

import contextlib
import math
import os
from collections.abc import Generator, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import replacing

_UNSPECIFIED = 2  # value of an absent color tag in a video stream
_BT709 = 1
# PyAV up to 18 rejects undecodable metadata unless asked to replace it; PyAV 19 accepts it and has no such option.
_TOLERANT: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}


class VideoError(UserError):
    """Unusable file; the message is one line with the file and the cause."""


def duration(path: str | os.PathLike) -> float:
    """Returns the length of a video in seconds from its header; 0.0 if the header lacks it.

    Raises:
      VideoError: if the file is missing, corrupt or has no video stream.
    """
    with _open(path) as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / av.time_base


def read_clip(
    path: str | os.PathLike,
    num_frames: int = 14,
    fps: float = 7.0,
    start: float = 0.0,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """Reads a clip at a fixed rate. Damage that a player would hide is an error here.

    Args:
      path: the file.
      num_frames: number of frames.
      fps: rate of the frames. Frame k is the one on screen at `start + k / fps` seconds by timestamp, so the rate of
        the file does not matter and may vary.
      start: beginning of the clip in seconds.
      height, width: size of the result, by `cover_resize_crop`; None for both keeps that of the file.
    Returns:
      uint8 `[t, h, w, 3]` RGB.
    Raises:
      ValueError: if only one of `height` and `width` is given.
      VideoError: if the file is missing, corrupt, has no video stream or is too short.
    """
    if (height is None) != (width is None):
        raise ValueError("give both height and width, or neither")
    with _open(path) as (container, stream):
        # Containers round timestamps to their own clock: 1/7 s is 0.143 s in a file that counts milliseconds.
        rounding = min(float(stream.time_base) / 2, 1e-3)
        begin = float((stream.start_time or 0) * stream.time_base) + start
        if start > 0:
            container.seek(math.floor(begin / stream.time_base), stream=stream)
        times = begin + rounding + np.arange(num_frames) / fps
        picked = _on_screen(container.decode(stream), times, 1 / float(stream.average_rate or fps))
        if len(picked) < num_frames:
            have = f"{len(picked)} of {num_frames} frames at {fps:g} fps from {start:g} s"
            raise VideoError(f"{path}: too short: {have}")
        aspect = stream.sample_aspect_ratio or 1
        clip = np.stack([_to_rgb(frame, aspect) for frame in picked])
    return clip if height is None or width is None else cover_resize_crop(clip, height, width)


def cover_resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames to cover height x width at their aspect ratio, and crops the center.

    The filter is Lanczos, antialiased when shrinking.

    Args:
      frames: uint8 `[..., h, w, 3]`.
      height, width: size of the result in pixels.
    Returns:
      uint8 `[..., height, width, 3]`.
    """
    h, w = frames.shape[-3:-1]
    if (h, w) == (height, width):
        return frames
    scale = max(height / h, width / w)
    left, top = max(0.0, (w - width / scale) / 2), max(0.0, (h - height / scale) / 2)
    box = (left, top, w - left, h - top)
    flat = frames.reshape(-1, h, w, 3)
    resized = [Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS, box) for f in flat]
    return np.stack([np.asarray(image) for image in resized]).reshape(*frames.shape[:-3], height, width, 3)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float = 7.0) -> None:
    """Writes frames as .mp4, .gif, .webp or .png (all frames side by side), complete or not at all.

    Missing folders are created. mp4 is H.264 with BT.709 color, which needs even sides: the last row or column of an
    odd side is repeated.

    Args:
      path: the file; its suffix selects the format.
      frames: uint8 `[t, h, w, 3]` RGB.
      fps: frames per second.
    Raises:
      UserError: if the suffix is unknown.
      ValueError: if `frames` have another shape or dtype.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(_WRITERS)}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{path}: frames must be uint8 [t, h, w, 3], got {frames.dtype} {list(frames.shape)}")
    with replacing(path) as temporary:
        writer(temporary, frames, fps)


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Generator[tuple, None, None]:
    """Yields (container, video stream) with a decoder that refuses damage; FFmpeg errors become VideoError."""
    try:
        with av.open(str(path), "r", **_TOLERANT) as container:
            # FFmpeg presents the cover picture of a song as a video stream.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{path}: no video stream")
            if streams[0].codec_context is None:
                raise VideoError(f"{path}: no decoder for this kind of video")
            streams[0].codec_context.options = {"err_detect": "explode"}
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot read the video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns the cause in one line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def _on_screen(frames: Iterable[av.VideoFrame], times: np.ndarray, period: float) -> list[av.VideoFrame]:
    """Returns for each of the ascending `times` the latest frame at or before it; stops where the video ends.

    `period` is the duration in seconds of a last frame without one. A video that begins less than one period after the
    first time counts from its first frame.
    """
    picked, shown = [], None
    for frame in frames:
        if frame.time is None or (shown is None and frame.time > times[0] + period):
            raise av.error.InvalidDataError(0, f"no frame at {times[0]:.2f} s")
        while shown is not None and len(picked) < len(times) and times[len(picked)] < frame.time:
            picked.append(shown)
        if len(picked) == len(times):
            return picked
        shown = frame
    if shown is None:
        return picked
    length = float(shown.duration * shown.time_base) if shown.duration and shown.time_base else period
    end = shown.time + length
    return picked + [shown for time in times[len(picked) :] if time < end]


def _to_rgb(frame: av.VideoFrame, aspect: Fraction | int) -> np.ndarray:
    """Converts a decoded frame to uint8 `[h, w, 3]` RGB, upright and with square pixels."""
    # HD video without a color tag is BT.709 by convention; the converter assumes BT.601.
    untagged_hd = frame.colorspace == _UNSPECIFIED and frame.height >= 720 and not frame.format.is_rgb
    source = Colorspace.ITU709 if untagged_hd else None
    rgb = frame.reformat(width=round(frame.width * aspect), format="rgb24", src_colorspace=source).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90))


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    t, h, w, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "16"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: np.ndarray, fps: float, kind: str, tick: int, **options) -> None:
    # Durations are multiples of `tick` milliseconds; rounding times instead of durations preserves the rate.
    times = np.round(np.arange(len(frames) + 1) * 1000 / fps / tick).astype(int) * tick
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, kind, save_all=True, append_images=rest, duration=np.diff(times).tolist(), loop=0, **options)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    _write_animation(path, frames, fps, "GIF", tick=10)


def _write_webp(path: Path, frames: np.ndarray, fps: float) -> None:
    _write_animation(path, frames, fps, "WEBP", tick=1, quality=90)


def _write_strip(path: Path, frames: np.ndarray, fps: float) -> None:
    del fps  # a still image has no rate
    Image.fromarray(np.concatenate(frames, axis=1)).save(path, "PNG")


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp, ".png": _write_strip}

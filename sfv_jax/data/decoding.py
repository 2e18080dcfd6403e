"""Decoding of the frames on screen at given times: where to begin, which timestamps to trust, which damage counts.

A file is read in attempts. The first seeks to just before the clip and accepts no complaint of the decoder. If the seek
was inexact, the next begins earlier; if timestamps are wrong, at the beginning of the file, by other ones; if the
decoder complains, its complaints are weighed.
"""

import contextlib
import dataclasses
import functools
import math
import re
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from sfv_jax.data import timestamps
from sfv_jax.data.interlacing import deinterlaced
from sfv_jax.data.timestamps import Clock, Disordered

# PyAV up to 18 rejects undecodable metadata unless asked to replace it; PyAV 19 accepts it and has no such option.
_TOLERANT: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Seconds before the clip at which to begin, and at which to begin next; None is the beginning of the file.
_EARLIER: dict[float | None, float | None] = {0.0: 2.0, 2.0: 10.0, 10.0: 60.0, 60.0: None}
_HARMLESS = re.compile(r"\bSEI\b")  # supplemental enhancement information, by its name not part of pictures
# A decoder that starts amid a video misses frames that others refer to, until it has recovered.
_MISSING = re.compile(
    r"[Mm]issing reference|reference picture missing|unref short failure|[Ff]rame num|co located|find ref"
)
_RECOVERY = 32  # packets after a key frame; twice the number of frames that H.264 may keep for reference
_LISTENING = threading.Lock()  # FFmpeg has one log for all threads


Converter = Callable[[float], Callable[[av.VideoFrame], np.ndarray]]


class _NotYet(Exception):
    """Signal that the first frame after a seek is later than the first wanted one."""


class _Doubtful(Exception):
    """Signal of a complaint of the strict decoder."""


class _Unreferenced(Exception):
    """Signal of a complaint that a frame refers to a missing one, perhaps to one before a seek."""


def frames_on_screen(path: Path, start: float, offsets: np.ndarray, converter: Converter) -> list[np.ndarray]:
    """Decodes the frames on screen at given times.

    Args:
      path: the video.
      start: seconds from the beginning of the video.
      offsets: ascending seconds from `start`, float `[t]`.
      converter: from the width of a pixel by its height to a function that converts a frame. That is called for each
        wanted frame as it comes, so that no more than a few decoded ones are in memory; a second attempt begins with
        a function of its own.
    Returns:
      Up to `t` converted frames, fewer if the video ends before. A frame that is on screen twice is there twice.
    Raises:
      av.error.FFmpegError: if the file cannot be read or a frame that matters is damaged.
      OSError: if it is no regular file.
    """
    attempt = _Attempt(back=0.0 if start > 0 else None)
    while True:
        try:
            return attempt.frames(path, start, offsets, converter)
        except _NotYet:
            attempt = dataclasses.replace(attempt, back=_EARLIER[attempt.back])
        except Disordered as signal:
            back = attempt.back if signal.seekable else None
            attempt = dataclasses.replace(attempt, back=back, presentation=False)
        except _Doubtful:
            attempt = dataclasses.replace(attempt, strict=False)
        except _Unreferenced as complaint:
            if attempt.back is None:
                raise av.error.InvalidDataError(0, str(complaint)) from complaint
            attempt = dataclasses.replace(attempt, back=_EARLIER[attempt.back])


def duration(path: Path) -> float:
    """Returns the length of a video in seconds; raises like `frames_on_screen`."""
    with _open(path) as (container, stream):
        return timestamps.length(container, stream)


@contextlib.contextmanager
def _open(path: Path, strict: bool = True) -> Generator[tuple[InputContainer, VideoStream], None, None]:
    """Yields (container, video stream); a strict decoder raises an error for all that it finds wrong."""
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for its writer
        raise av.error.InvalidDataError(0, "not a regular file")
    # Without a protocol, FFmpeg takes "a:" of a name for one. Playlists may not reach beyond files.
    local = {"protocol_whitelist": "file"}
    with av.open(f"file:{path}", "r", container_options=local, **_TOLERANT) as container:
        stream = _main_stream(container)
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        else:
            stream.codec_context.thread_type = "NONE"  # other threads neither flag damage nor log to this one
        yield container, stream


def _main_stream(container: InputContainer) -> VideoStream:
    """Returns the video stream that is the default, or else the first; cover pictures are no video."""
    streams = [s for s in container.streams.video if not s.disposition & _NO_VIDEO]
    if not streams:
        raise av.error.InvalidDataError(0, "no video stream")
    defaults = [s for s in streams if s.disposition & Disposition.default]
    stream = (defaults or streams)[0]
    if stream.codec_context is None:
        raise av.error.InvalidDataError(0, "no decoder for this kind of video")
    return stream


@dataclass(frozen=True)
class _Attempt:
    """One way to read a clip.

    Attributes:
      back: seconds before the clip to begin at; None for the beginning of the file.
      presentation: whether to go by presentation timestamps, not decoding timestamps.
      strict: whether every complaint of the decoder counts.
    """

    back: float | None
    presentation: bool = True
    strict: bool = True

    def frames(self, path: Path, start: float, offsets: np.ndarray, converter: Converter) -> list[np.ndarray]:
        """Returns what `frames_on_screen` does; raises its signals, too."""
        with _open(path, self.strict) as (container, stream), contextlib.ExitStack() as stack:
            if self.presentation:
                timestamps.check_container(container, stream)
            if self.back is not None and timestamps.have_gaps(container):
                raise _NotYet
            if not self.strict:
                stack.enter_context(_log())
            clock = Clock(stream, self.presentation, self.back is not None)
            tick = stream.time_base or Fraction(1, av.time_base)
            begin = None
            if stream.start_time is not None and (self.presentation or self.back is not None):
                begin = float(stream.start_time * tick)
            if self.back is not None:
                begin = begin or 0.0
                _seek(container, stream, math.floor((begin + start - self.back) / tick))
            decoded = _sound(container, stream, self, clock)
            timed = deinterlaced((clock.time(frame), frame) for frame in decoded)
            # Containers round timestamps to their own clock: 1/7 s is 0.143 s in a file that counts milliseconds.
            wanted = start + min(float(tick) / 2, 1e-3) + offsets
            ratio = stream.sample_aspect_ratio  # from PyAV 19.0.1 on of its own type; falsy if unknown
            convert = functools.lru_cache(maxsize=1)(converter(float(ratio) if ratio else 1.0))
            return self._on_screen(timed, begin, wanted, clock, convert)

    def _on_screen(
        self,
        timed: Iterator[tuple[float, av.VideoFrame]],
        begin: float | None,
        wanted: np.ndarray,
        clock: Clock,
        convert: Callable[[av.VideoFrame], np.ndarray],
    ) -> list[np.ndarray]:
        """Returns for each of the times `wanted` after `begin` the latest frame at or before it, converted.

        A video that begins later than its container says, or than the first wanted time, counts from its first frame.
        """
        first = next(timed, None)
        if self.back is not None and (first is None or first[0] > begin + wanted[0]):
            raise _NotYet
        if first is None:
            return []
        now, shown = first
        if begin is None or (self.back is None and now > begin + clock.step + 1e-3):
            begin = now
        times, picked = begin + wanted, []
        for now, frame in timed:
            while len(picked) < len(times) and times[len(picked)] < now:
                picked.append(convert(shown))
            if len(picked) == len(times):
                return picked
            shown = frame
        end = now + clock.length(shown)
        return picked + [convert(shown) for time in times[len(picked) :] if time < end]


def _seek(container: InputContainer, stream: VideoStream, stamp: int) -> None:
    try:
        container.seek(stamp, stream=stream)
    except av.error.FFmpegError as error:
        raise _NotYet from error


def _sound(container: InputContainer, stream: VideoStream, attempt: _Attempt, clock: Clock) -> Iterator[av.VideoFrame]:
    """Yields the decoded frames from the first key frame on, without those that refer to frames before it.

    Raises:
      _Doubtful: at a complaint of a strict decoder.
      _Unreferenced, av.error.InvalidDataError: at a complaint of another decoder that matters.
    """
    amid = sought = attempt.back is not None
    verdict = _Verdict(attempt.strict)

    def stamp(data: Packet | av.VideoFrame) -> int | None:  # None where decoding timestamps are late
        return data.pts if attempt.presentation else data.dts if sought else None

    for packet in container.demux(stream):
        if not packet.size and packet.dts is not None:
            continue  # a repetition of the last frame; decoders take an empty packet for the end
        clock.feed(packet)
        key = stamp(packet)
        if verdict.waiting and packet.is_keyframe and key is not None:
            verdict.begin(key, _is_independent(packet, stream), amid)
        amid = True
        frames, complaints = _decode(packet, attempt.strict)
        verdict.hear(key, complaints)
        for frame in frames:
            if (sought and verdict.waiting) or verdict.is_leading(stamp(frame)):
                continue
            verdict.check(frame, stamp(frame))
            yield frame
    verdict.check()


def _decode(packet: Packet, strict: bool) -> tuple[list[av.VideoFrame], list[str]]:
    """Returns the frames that a packet completes, and the complaints of a decoder that is not strict."""
    if strict:
        try:
            return packet.decode(), []
        except av.error.FFmpegError as error:
            raise _Doubtful from error
    frames: list[av.VideoFrame] = []
    errors: list[str] = []
    with av.logging.Capture() as logs:  # pyrefly: ignore[bad-context-manager]
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            errors = [error.strerror or str(error)]
    return frames, [text for level, _, text in logs if level <= av.logging.ERROR] + errors


class _Verdict:
    """Complaints of a decoder, and which of them matter.

    Those about packets before the first key frame do not, in the order of the file, and in that of the screen if the
    key frame is not independent or not the first of the file: these frames are not used. A decoder that begins amid a
    video misses frames that are referred to: complaints about that do not matter before it outputs the first frame, and
    for the few frames after a key frame that is not independent, which may dismiss older frames that were never there.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self._heard: list[tuple[int | None, str]] = []
        self._leading_below: int | None = None  # timestamp of the key frame, if frames shown before it are not used
        self._first: int | None = None  # timestamp of the first frame
        self._recovering = 0  # packets left for which missing references are natural
        self.waiting = True  # for a key frame, or else a frame that the decoder considers sound

    def begin(self, key: int, independent: bool, amid: bool) -> None:
        """Begins with the packet of the first key frame.

        Args:
          key: its timestamp.
          independent: whether no later frame refers to one before it.
          amid: whether it is not the first of the file.
        """
        self.waiting = False
        self._leading_below = key if amid or not independent else None
        self._recovering = 0 if independent else _RECOVERY
        self._heard.clear()

    def is_leading(self, stamp: int | None) -> bool:
        """Returns whether a frame or packet is shown before the key frame that decoding began with, and not used."""
        return stamp is not None and self._leading_below is not None and stamp < self._leading_below

    def hear(self, stamp: int | None, complaints: list[str]) -> None:
        """Adds the complaints about a packet; `stamp` is its presentation timestamp, if that is to be trusted."""
        self._recovering -= 1
        for text in complaints:
            missing = self._recovering >= 0 and _MISSING.search(text)
            if not (missing or self.is_leading(stamp) or _HARMLESS.search(text)):
                self._heard.append((stamp, text.strip()))

    def check(self, frame: av.VideoFrame | None = None, stamp: int | None = None) -> None:
        """Checks the next frame with its timestamp, or the end of the file.

        Raises:
          _Doubtful: if a strict decoder decoded a damaged frame.
          _Unreferenced: if a complaint matters that may come from a seek.
          av.error.InvalidDataError: if another complaint matters.
        """
        if frame is not None:
            self.waiting = False
            self._first = stamp if self._first is None else self._first
            if frame.is_corrupt:
                self._heard.append((None, "a frame is damaged"))
        for place, text in self._heard:
            missing = _MISSING.search(text)
            if self._strict:
                raise _Doubtful
            if not (missing and place is not None and self._first is not None and place < self._first):
                raise _Unreferenced(text) if missing else av.error.InvalidDataError(0, text)


def _is_independent(packet: Packet, stream: VideoStream) -> bool:
    """Returns whether no frame after this key frame refers to one before; for codecs other than H.264 it is assumed."""
    if stream.codec_context.name != "h264":
        return True
    data, extra = bytes(packet), stream.codec_context.extradata or b""
    if extra[:1] != b"\x01":  # units begin with 0 0 1
        return any(unit[:1] and unit[0] & 31 == 5 for unit in data.split(b"\0\0\1")[1:])
    size, at = (extra[4] & 3) + 1, 0  # units begin with their length
    while at + size < len(data):
        if data[at + size] & 31 == 5:
            return True
        at += size + int.from_bytes(data[at : at + size], "big")
    return False


@contextlib.contextmanager
def _log() -> Generator[None, None, None]:
    """Makes FFmpeg report its errors to `av.logging.Capture`; those of other threads are dropped."""
    with _LISTENING, av.logging.Capture(local=False):  # pyrefly: ignore[bad-context-manager]
        level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_skip_repeated(False)
        av.logging.set_level(av.logging.ERROR)
        try:
            yield
        finally:
            # To None, PyAV's default, there is no way back: messages of other threads under way compare with the level.
            av.logging.set_level(av.logging.PANIC if level is None else level)
            av.logging.set_skip_repeated(skip)

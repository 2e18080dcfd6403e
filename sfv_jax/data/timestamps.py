"""Presentation times of decoded frames, also where a file lacks them or has wrong ones."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

_JUMP = 0.1  # seconds; FFmpeg takes a longer step back for the start of another recording in the same file
# Formats without a timestamp for each frame. FFmpeg counts on from the last timestamp, after a seek from a guess. It
# takes the last timestamp for the end, or estimates the end from the bit rate.
_SPARSE = ("mpeg", "mpegvideo", "m4v", "h264", "hevc", "obu")
_COUNTED = ("h264", "hevc", "mpeg4")  # codecs whose decoders make one frame of each picture
_VOP = b"\0\0\1\xb6"  # begin of a picture of MPEG-4
_LARGEST_EMPTY_VOP = 8  # bytes: a header with vop_coded = 0; one bit for each macroblock would exceed it


class Disordered(Exception):
    """Signal that decoding timestamps are to be used; `seekable` if they are those of presentation, without delay."""

    def __init__(self, seekable: bool = False):
        self.seekable = seekable


def have_gaps(container: InputContainer) -> bool:
    """Returns whether the timestamps of a file are right only if it is read from the beginning."""
    return container.format.name in _SPARSE


def check_container(container: InputContainer, stream: VideoStream) -> None:
    """Checks that the file stores presentation times. AVI does not; FFmpeg guesses them, and not always right.

    Raises:
      Disordered: if it does not.
    """
    if container.format.name == "avi":
        raise Disordered(seekable=not stream.codec_context.has_b_frames)


class Clock:
    """Clock of a stream: gives each decoded frame its time, in seconds, never decreasing.

    The rule is that of FFmpeg's best-effort timestamps: presentation timestamps as long as they have no more faults
    (steps that are not forward) than decoding timestamps, else decoding timestamps. Those that frames have are in the
    order of presentation, but late by the reordering delay, which some decoders increase amid a video. Where packets
    can be counted from the beginning of the file, frame k has the timestamp of packet k instead, without those that
    only repeat a picture. A frame without a timestamp is one step after the last.

    Attributes:
      presentation: whether times are presentation timestamps.
      step: seconds from the last frame to the next, as far as known.
    """

    def __init__(self, stream: VideoStream, presentation: bool, sought: bool):
        self.presentation = presentation
        self.step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        self._tick = stream.time_base or Fraction(1, av.time_base)
        self._last: dict[str, int] = {}
        self._faults = {"pts": 0, "dts": 0}
        self._now: float | None = None
        self._shift = 0.0  # of the times after a step back
        self._codec = stream.codec_context.name
        counted = self._codec in _COUNTED and not presentation and not sought
        self._packets: deque[int] | None = deque() if counted else None
        self._packed = 0  # pictures of MPEG-4 that came in a packet with another one

    def feed(self, packet: Packet) -> None:
        """Takes the timestamp of a packet before its decoding."""
        if self._packets is None or packet.dts is None:
            return
        if self._codec == "mpeg4":
            self._packed += bytes(packet).count(_VOP) - 1
            if packet.size <= _LARGEST_EMPTY_VOP:  # stands for a packed picture, or else repeats the last one
                if not self._packed:
                    return
                self._packed -= 1
        self._packets.append(packet.dts)

    def time(self, frame: av.VideoFrame) -> float:
        """Returns the time of the next frame.

        Raises:
          Disordered: if presentation timestamps are not to be trusted; the file has to be read again.
        """
        for kind in ("pts", "dts"):
            stamp = getattr(frame, kind)
            if stamp is not None:
                self._faults[kind] += stamp <= self._last.get(kind, stamp - 1)
                self._last[kind] = stamp
        if self.presentation and (frame.pts is None or self._faults["pts"] > self._faults["dts"]):
            raise Disordered
        if self.presentation:
            stamp = frame.pts
        elif self._packets is None:
            stamp = frame.dts
        else:
            stamp = self._packets.popleft() if self._packets else None
        self._now = self._after(None if stamp is None else float(stamp * self._tick) + self._shift)
        return self._now

    def length(self, frame: av.VideoFrame) -> float:
        """Returns the seconds for which the last frame of the file is on screen."""
        if self.presentation and frame.duration and frame.time_base:
            return float(frame.duration * frame.time_base)
        return self.step

    def _after(self, time: float | None) -> float:
        """Returns the time of a frame that follows the last one and has the timestamp `time`, or none."""
        if self._now is None:
            return time or 0.0
        if time is None:
            return self._now + self.step
        if time < self._now - _JUMP:
            self._shift += self._now + self.step - time
            return self._now + self.step
        if not self.presentation and time > self._now:
            self.step = time - self._now
        return max(time, self._now)


def length(container: InputContainer, stream: VideoStream) -> float:
    """Returns the length of a video stream in seconds: that of its header, or else of its packets."""
    if stream.duration and stream.time_base and not have_gaps(container):
        return float(stream.duration * stream.time_base)
    stamps = list(_extents(container, stream))
    if not stamps:
        return 0.0
    first, end = min(begin for begin, _ in stamps), max(end for _, end in stamps)
    return float((end - first) * (stream.time_base or Fraction(1, av.time_base)))


def _extents(container: InputContainer, stream: VideoStream) -> Iterator[tuple[Fraction, Fraction]]:
    """Yields the begin and end of each packet on screen, in ticks of the stream."""
    tick = stream.time_base or Fraction(1, av.time_base)
    step = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25)) / tick
    count = 0
    for packet in container.demux(stream):
        if packet.size:
            stamp = packet.dts if packet.pts is None else packet.pts
            begin = Fraction(count * step if stamp is None else stamp)
            yield begin, begin + (packet.duration or step)
            count += 1

"""Deinterlacing of decoded frames. Progressive video passes unchanged."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av
import av.filter
from av.filter import Graph

_FILTER = "bwdif" if "bwdif" in av.filter.filters_available else "yadif"


def deinterlaced(timed: Iterator[tuple[float, av.VideoFrame]]) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields `(time, frame)` with interlaced frames made progressive, one for one, from a frame and its neighbors."""
    graph, shape = None, None
    times: deque[float] = deque()
    for time, frame in timed:
        if graph is not None and shape != _shape(frame):
            yield from _pulled(graph, times, last=True)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, shape = _graph(frame), _shape(frame)
        if graph is None:
            yield time, frame
            continue
        times.append(time)
        graph.push(frame)
        yield from _pulled(graph, times)
    if graph is not None:
        yield from _pulled(graph, times, last=True)


def _shape(frame: av.VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _graph(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    size = {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base or Fraction(1, av.time_base))
    graph.link_nodes(source, graph.add(_FILTER, "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Graph, times: deque[float], last: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields the frames that are ready, with their times; with `last`, all that are left."""
    if last:
        graph.push(None)
    while times:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EOFError):  # FFmpeg's EAGAIN and end
            return
        yield times.popleft(), frame

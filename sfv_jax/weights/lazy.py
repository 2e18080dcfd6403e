"""Parameters that are still on disk: read when they are written, so that a conversion holds little at a time."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

IN_FLIGHT = 2**28  # bytes of parameters read and being written at a time; a larger parameter goes alone


@dataclass(frozen=True)
class Lazy:
    """A leaf of a parameter tree that `read` gets as a numpy array of `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


class _LazyHandler(type_handlers.NumpyHandler):
    """Saves `Lazy` leaves as what they become, some at a time.

    Attributes:
      error: what a leaf raised. Kept for `save_tree`, as orbax would report it with the traces of three threads.
      stopped: nobody waits for the rest.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.error: Exception | None = None
        self.stopped = False

    async def _background_serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for group in _groups([value.nbytes for value in values]):
            arrays = []
            for n in group:
                if self.stopped:
                    return
                try:
                    arrays.append(np.ascontiguousarray(values[n].read()))
                except Exception as error:
                    self.error = error
                    return
            await super()._background_serialize(arrays, [infos[n] for n in group], [args[n] for n in group])


def _groups(sizes: list[int]) -> list[list[int]]:
    """Positions of `sizes` in order, cut into runs of at most IN_FLIGHT bytes (or one)."""
    groups: list[list[int]] = []
    used = 0
    for n, size in enumerate(sizes):
        if not groups or used + size > IN_FLIGHT:
            groups.append([])
            used = 0
        groups[-1].append(n)
        used += size
    return groups


def read_all(params: dict) -> dict:
    """The same tree with numpy arrays for `Lazy` leaves."""
    return jax.tree.map(lambda leaf: leaf.read(), params)


def watched(params: dict, done: Callable[[int], None]) -> dict:
    """The same tree, calling `done(bytes)` whenever a `Lazy` leaf has been read."""

    def watch(leaf):
        def read() -> np.ndarray:
            value = leaf.read()
            done(leaf.nbytes)
            return value

        return Lazy(leaf.shape, leaf.dtype, read) if isinstance(leaf, Lazy) else leaf

    return jax.tree.map(watch, params)


def save_tree(path: Path, params: dict) -> None:
    """Writes an orbax tree of jax, numpy or `Lazy` leaves, which `ocp.StandardCheckpointer` restores.

    Raises:
      Exception: the first that a leaf raises. What was written by then is to be removed by the caller.
    """
    lazy = _LazyHandler()
    registry = type_handlers.create_type_handler_registry(
        (Lazy, lazy),
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    before = set(threading.enumerate())
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(path, ocp.args.PyTreeSave(params))
        except BaseException:  # orbax's threads go on writing: nobody may clear the folder before they end
            lazy.stopped = True
            for thread in set(threading.enumerate()) - before:
                if not thread.daemon:
                    thread.join(timeout=60)
            if lazy.error is None:
                raise
    if lazy.error is not None:
        raise lazy.error

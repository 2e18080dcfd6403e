"""Parameters that remain on disk until they are written, so that a conversion needs little memory."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

IN_FLIGHT = 2**28  # bytes of parameters in memory while a tree is written; a larger parameter is written alone


@dataclass(frozen=True)
class Lazy:
    """Leaf of a parameter tree whose `read()` returns a numpy array of `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * np.dtype(self.dtype).itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


class _LazyHandler(type_handlers.NumpyHandler):
    """Orbax handler that saves `Lazy` leaves as numpy arrays, at most `IN_FLIGHT` bytes at a time.

    Attributes:
      error: exception of a leaf's `read`, for `save_tree`; orbax would report it with the traces of three threads.
      stopped: whether the remaining leaves are to be skipped.
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
    """Splits the positions of `sizes` into consecutive runs of at most `IN_FLIGHT` bytes or of one position."""
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
    """Returns the tree with numpy arrays in place of its `Lazy` leaves."""
    return jax.tree.map(lambda leaf: leaf.read(), params)


def watched(params: dict, done: Callable[[int], None]) -> dict:
    """Returns the tree with `Lazy` leaves that call `done(bytes)` after each read."""

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
      Exception: if a leaf raises it; the first one. The caller must remove the incomplete files.
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
        except BaseException:  # orbax's threads continue to write: the folder must not be removed before they end
            lazy.stopped = True
            for thread in set(threading.enumerate()) - before:
                if not thread.daemon:
                    thread.join(timeout=60)
            if lazy.error is None:
                raise
    if lazy.error is not None:
        raise lazy.error

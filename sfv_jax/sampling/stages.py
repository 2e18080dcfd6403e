"""The stages of one call of a sampler: timed, announced, and shown while they are compiled."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sfv_jax.runtime.progress import compiling
from sfv_jax.runtime.sharding import on_mesh

STAGES = {"clip": "image encoder", "encode": "VAE encoder", "denoise": "UNet", "decode": "decoder"}
Watch = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
Enter = Callable[[str, bool], None]


class Stages:
    """Stages of one call of a sampler: computed on its mesh, timed, announced, and shown while they are compiled.

    Attributes:
      about: description of the videos.
      steps: calls of the UNet.
      new: whether programs for them may have to be compiled.
    """

    def __init__(
        self, mesh: Mesh | None, times: dict[str, float] | None, watch: Watch | None, enter: Enter | None = None
    ):
        self.mesh, self.times, self.watch = mesh, times, watch
        self.about, self.steps, self.new = "", 1, True
        self.enter: Enter = enter or (lambda name, new: None)

    def __call__(self, name: str, fn: Callable, *args, **kw) -> Any:
        """Returns `fn(...)`; with `times`, waits for it and notes its seconds."""
        self.enter(name, self.new)
        began = time.perf_counter()
        about = f"{STAGES[name]}, {self.about}"
        about += f" in {self.steps} steps" if name == "denoise" and self.steps > 1 else ""
        with compiling(about) if self.watch and self.new else nullcontext():
            result = (fn if self.mesh is None else on_mesh(self.mesh, fn))(*args, **kw)
        if self.times is not None:
            jax.block_until_ready(result)
            self.times[name] = time.perf_counter() - began
        return result

    def watched(self, count: int, what: str) -> AbstractContextManager[Callable[[int], None] | None]:
        """Returns the context of the progress of `count` steps of a stage."""
        return self.watch(count, what) if self.watch and count > 1 else nullcontext()


def timed(coming: Iterator[np.ndarray], times: dict[str, float]) -> Iterator[np.ndarray]:
    """Yields what comes; adds the seconds of waiting for it to `times["decode"]`."""
    times["decode"] = 0.0
    while True:
        began = time.perf_counter()
        frame = next(coming, None)
        times["decode"] += time.perf_counter() - began
        if frame is None:
            return
        yield frame

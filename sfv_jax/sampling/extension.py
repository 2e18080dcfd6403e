"""Longer videos: the last frame of a video is the image of its next chunk of frames.

A model reproduces its image in its first frame, so the first frame of each further chunk repeats the frame before and
is left out. This module does not import JAX.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sfv_jax.choices import COLORS, MOST_CHUNKS, MOST_NOISE
from sfv_jax.errors import UserError
from sfv_jax.runtime.progress import say

Images = Sequence[np.ndarray] | np.ndarray  # uint8 [h, w, 3] each
Call = Callable[..., Iterable[np.ndarray]]  # images, seed and options to frames uint8 [b, h, w, 3], one after another


@dataclass(frozen=True)
class Extension:
    """How a video is extended.

    Attributes:
      chunks: number of further chunks.
      noise_aug_strength: deviation of the noise on the image of a further chunk, which the model is told; None: as in
        the first chunk.
      color: one of `choices.COLORS`. "keep": colors stay as decoded; "match": all frames of a further chunk are shifted
        per channel so that the first one shown has the mean color of the frame before.

    Raises:
      UserError: if a value is impossible.
    """

    chunks: int
    noise_aug_strength: float | None = None
    color: str = "keep"

    def __post_init__(self):
        whole = isinstance(self.chunks, int | np.integer) and not isinstance(self.chunks, bool)
        if not whole or not 0 <= self.chunks <= MOST_CHUNKS:
            raise UserError(f"chunks {self.chunks!r}: give a whole number from 0 to {MOST_CHUNKS}")
        noise = self.noise_aug_strength
        if noise is not None and not 0 <= noise <= MOST_NOISE:
            raise UserError(f"noise_aug_strength {noise!r} of further chunks: give a number from 0 to {MOST_NOISE:g}")
        if self.color not in COLORS:
            raise UserError(f"color {self.color!r}: choose one of {', '.join(COLORS)}")

    def seeds(self, seed: int) -> list[int]:
        """Returns the seeds of all chunks, the first `seed` itself; `Sampler` with them makes the same chunks."""
        further = range(1, self.chunks + 1)
        return [seed, *(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]) for n in further)]

    def length(self, num_frames: int) -> int:
        """Returns the number of frames of a video of chunks of `num_frames`.

        Raises:
          UserError: if further chunks would add nothing.
        """
        if self.chunks and num_frames < 2:
            raise UserError("a video of 1 frame cannot be extended: each chunk repeats the last frame; use more frames")
        return num_frames + self.chunks * (num_frames - 1)

    def record(self, seed: int, length: int) -> dict[str, Any]:
        """Returns the fields of a record for a video of `length` frames."""
        seeds = self.seeds(seed)
        frames = (length - 1) // len(seeds) + 1
        return asdict(self) | {"chunks": len(seeds) - 1, "chunk_frames": frames, "seeds": seeds}

    def frames(self, call: Call, images: Images, seeds: Sequence[int], options: dict[str, Any]) -> Iterator[np.ndarray]:
        """Returns the frames uint8 `[b, h, w, 3]` of extended videos, each when it is there. Begins the first chunk.

        Args:
          call: as `Sampler.__call__`, but with the frames of all videos one after another.
          images: uint8 `[h, w, 3]` each.
          seeds: one per image.
          options: other arguments of `call`. Start noise (`noise`) is that of the first chunk.
        """
        rows = [self.seeds(seed) for seed in seeds]
        further = {name: value for name, value in options.items() if name != "noise"}
        if self.noise_aug_strength is not None:
            further["noise_aug_strength"] = self.noise_aug_strength

        def chunk(n: int, images: Images) -> Iterator[np.ndarray]:
            if self.chunks and options.get("watch"):
                say(f"chunk {n + 1} of {self.chunks + 1}")
            return iter(call(images, seed=[row[n] for row in rows], **(further if n else options)))

        return self._joined(chunk, chunk(0, images))

    def _joined(
        self, chunk: Callable[[int, Images], Iterator[np.ndarray]], coming: Iterator[np.ndarray]
    ) -> Iterator[np.ndarray]:
        last: Images = ()
        for n in range(self.chunks + 1):
            if n:
                coming = chunk(n, last)
                next(coming)
                first = next(coming)
                coming = map(correction(first, np.asarray(last), self.color), itertools.chain([first], coming))
            for last in coming:
                yield last


def correction(frame: np.ndarray, before: np.ndarray, color: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the change of color for frames of a chunk, all uint8 `[b, h, w, 3]`.

    Args:
      frame: the first frame of the chunk that is shown.
      before: the frame before it.
      color: see `Extension`.
    """
    if color == "keep":
        return lambda x: x
    shift = before.mean((1, 2), keepdims=True) - frame.mean((1, 2), keepdims=True)
    return lambda x: np.clip(np.rint(x + shift), 0, 255).astype(np.uint8)

"""Exact scores in the procedural world, where every legal continuation of a first frame is known."""

import numpy as np

from sfv_jax.data.worlds import Label, World


def nearest_future(world: World, label: Label, frames: np.ndarray) -> tuple[float, Label]:
    """(RMSE in grey levels of 0..255, label) of the legal continuation of `label`'s first frame closest to `frames`.

    `frames` uint8 `[t, h, w, 3]`. Zero means a perfect video; an average of the futures is far from each of them, so a
    blur scores badly although it minimises the expected error against any one truth.
    """
    futures = world.futures(label)
    errors = [rmse(world.render(future), frames) for future in futures]
    best = int(np.argmin(errors))
    return errors[best], futures[best]


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean squared difference of uint8 arrays of one shape, in grey levels."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32)))))


def busiest_direction(labels: list[Label], directions: int) -> float:
    """Largest share of one direction among `labels`: 1 / directions when all are used alike, 1 after mode collapse."""
    return float(np.bincount([label.direction for label in labels], minlength=directions).max() / len(labels))

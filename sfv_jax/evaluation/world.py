"""Exact scores in the procedural world, where every legal continuation of a first frame can be rendered.

    labels = [world.label(n, "heldout") for n in range(64)]
    clips = ...  # uint8 [64, t, h, w, 3], generated from the first frames of world.render(label)
    scores = score(world, labels, clips)

One call computes all scores, world-FVD included; `MEANINGS` describes each of them for the footer of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import rearrange

from sfv_jax.data.worlds import PALETTE, Label, World
from sfv_jax.evaluation import worldnet
from sfv_jax.evaluation.frechet import MIN_SAMPLES, Moments, extrapolate, frechet_distance

Network = tuple[Callable[[np.ndarray], np.ndarray], dict]  # features of clips, and their description
LEGAL = 1.0  # pixels: RMS distance to the nearest legal path below which a path is legal
_GRID = 0.5  # pixels between the candidate positions of the object

MEANINGS = {
    "distance": "RMSE in gray levels (0..255) to the nearest legal continuation, 0 is perfect",
    "fit": "share of the difference from the background that one shape and color explain, mean over frames; 1 is best",
    "shape_kept": "share of frames in which the condition's shape fits best",
    "colour_kept": "share of frames in which the object's color is nearest to the condition's",
    "path_error": "RMS distance in pixels between the object's path and the nearest legal one, mean over clips",
    "legal": f"share of clips whose object follows a legal path, within {LEGAL:g} pixel",
    "directions_covered": "share of the legal directions that at least one legal clip takes",
    "busiest_direction": "share of the most frequent nearest direction, 1 after mode collapse",
    "world_fvd": "Frechet distance to all true continuations of the same first frames, on features of a network trained"
    " to classify the world's shapes, colors, directions and speeds; comparable at equal numbers of clips only",
}


def score(
    world: World, labels: list[Label], clips: np.ndarray, *, network: Network | Path | str | None = None, seed: int = 0
) -> dict:
    """Computes all scores of generated `clips`, each made from the first frame of one of `labels`.

    Args:
      world: the world of the labels.
      labels: one label per clip.
      clips: uint8 `[n, t, h, w, 3]` with the length and size of the world's clips.
      network: the result of `worldnet.load`; or the folder of its cache (default: the user's), in which a missing
        network is trained in a minute or two. A process reads it once.
      seed: seed of the bootstrap.
    Returns:
      `{score: number}` for the names of `MEANINGS` (`world_fvd` is None for fewer than 20 clips) and `clips`, the
      number of clips; with world-FVD also `world_fvd_extrapolated`, `world_fvd_interval` (a pair) and `network` (the
      description of the network, with its accuracy).
    Raises:
      ValueError: if the clips do not fit the labels or the world.
    """
    clips = np.asarray(clips)
    expected = (len(labels), world.num_frames, world.size, world.size, 3)
    if clips.dtype != np.uint8 or clips.shape != expected:
        raise ValueError(f"{len(labels)} labels need clips uint8 {expected}; got {clips.dtype} {clips.shape}")
    nearest = [nearest_future(world, label, clip) for label, clip in zip(labels, clips, strict=True)]
    tracks = [track(world, label, clip) for label, clip in zip(labels, clips, strict=True)]
    paths = [nearest_path(world, label, found.positions) for label, found in zip(labels, tracks, strict=True)]
    legal = [label.direction for error, label in paths if error < LEGAL]
    kept = list(zip(labels, tracks, strict=True))
    result = {
        "clips": len(clips),
        "distance": float(np.mean([error for error, _ in nearest])),
        "fit": float(np.mean([found.fit for found in tracks])),
        "shape_kept": float(np.mean([[s == label.shape for s in found.shapes] for label, found in kept])),
        "colour_kept": float(np.mean([[c == label.colour for c in found.colours] for label, found in kept])),
        "path_error": float(np.mean([error for error, _ in paths])),
        "legal": len(legal) / len(clips),
        "directions_covered": len(set(legal)) / world.directions,
        "busiest_direction": busiest_direction([label for _, label in nearest], world.directions),
        "world_fvd": None,
    }
    return result | (world_fvd(world, labels, clips, network=network, seed=seed) if len(clips) >= MIN_SAMPLES else {})


def world_fvd(
    world: World, labels: list[Label], clips: np.ndarray, *, network=None, seed: int = 0, resamples: int = 100
) -> dict:
    """Computes world-FVD: the part of the result of `score` that begins with `world_fvd`, and `network`.

    The true set contains every legal continuation of every first frame, so the two sets differ only in what was
    generated. The interval is over first frames drawn with replacement; the limit for infinitely many clips is that of
    `frechet.extrapolate`.

    Args:
      world, labels, clips, network, seed: as for `score`.
      resamples: number of bootstrap resamples.
    """
    features, about = network if isinstance(network, tuple) else _network(world, network)
    fake = features(clips)
    true = features(np.stack([world.render(future) for label in labels for future in world.futures(label)]))
    true = true.reshape(len(labels), -1, true.shape[-1])

    def distance(rows) -> float:
        return frechet_distance(Moments.of(np.concatenate(true[rows])), Moments.of(fake[rows]))

    rng, n = np.random.default_rng(seed), len(clips)
    value = distance(slice(None))
    draws = np.array([distance(rng.integers(n, size=n)) for _ in range(resamples)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5]) + value
    return {
        "world_fvd": value,
        "world_fvd_extrapolated": extrapolate(n, lambda _, rows: distance(rows), rng),
        "world_fvd_interval": (float(low), float(high)),
        "network": about,
    }


_network = lru_cache(maxsize=8)(worldnet.load)


@dataclass(frozen=True)
class Track:
    """The object found in each frame of a clip.

    Attributes:
      positions: float64 `[t, 2]`, (x, y) in pixels, to half a pixel: the position that explains most.
      shapes, colours: names of the shape that explains most and of the nearest color of the world, per frame.
      fit: `[t]`, share of the squared difference from the background that the object explains; 0 for an empty frame.
    """

    positions: np.ndarray
    shapes: list[str]
    colours: list[str]
    fit: np.ndarray


def track(world: World, label: Label, frames: np.ndarray) -> Track:
    """Finds the object in each of `frames` uint8 `[t, h, w, 3]`; `label` gives its background and size.

    Every shape of the world is tried at every position of a grid; its color is a least-squares fit.
    """
    low, high = world.bounds(label.radius)
    line = np.linspace(low, high, int(np.ceil((high - low) / _GRID)) + 1)
    places = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    stamps = np.concatenate([world.stamp(shape, label.radius, places) for shape in world.shapes])
    stamps = stamps.reshape(len(stamps), -1)
    background = np.asarray(world.backgrounds[label.background], np.float32)
    rest = frames.reshape(len(frames), -1, 3).astype(np.float32) - background
    weight = np.square(stamps).sum(1)
    overlap = rearrange(stamps @ rearrange(rest, "t k c -> k (t c)"), "n (t c) -> t n c", c=3)
    explained = np.square(overlap).sum(-1) / weight
    best = explained.argmax(1)
    rows = np.arange(len(frames))
    energy = np.square(rest).sum((1, 2))
    color = background + overlap[rows, best] / weight[best, None]
    palette = np.array([PALETTE[name] for name in world.colours], np.float32)
    nearest = np.square(color[:, None] - palette).sum(-1).argmin(1)
    return Track(
        positions=places[best % len(places)],
        shapes=[world.shapes[n] for n in best // len(places)],
        colours=[world.colours[n] for n in nearest],
        fit=explained[rows, best] / np.maximum(energy, 1.0),
    )


def nearest_path(world: World, label: Label, positions: np.ndarray) -> tuple[float, Label]:
    """Returns (RMS distance in pixels, label) of the legal continuation whose path is nearest to `positions [t, 2]`."""
    futures = world.futures(label)
    errors = [np.sqrt(np.square(world.positions(future) - positions).sum(-1).mean()) for future in futures]
    best = int(np.argmin(errors))
    return float(errors[best]), futures[best]


def nearest_future(world: World, label: Label, frames: np.ndarray) -> tuple[float, Label]:
    """Returns (RMSE in gray levels label) of the legal continuation nearest to `frames`, uint8 `[t, h, w, 3]`.

    Zero means a perfect video. An average of the futures is far from each of them, so a blur scores badly although it
    minimizes the expected error against any one truth.
    """
    futures = world.futures(label)
    errors = [rmse(world.render(future), frames) for future in futures]
    best = int(np.argmin(errors))
    return errors[best], futures[best]


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the root mean squared difference of uint8 arrays of one shape, in gray levels."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32)))))


def busiest_direction(labels: list[Label], directions: int) -> float:
    """Returns the largest share of one direction among `labels`: 1 / directions if uniform, 1 after mode collapse."""
    return float(np.bincount([label.direction for label in labels], minlength=directions).max() / len(labels))

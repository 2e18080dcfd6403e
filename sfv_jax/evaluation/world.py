"""Exact scores in the procedural world, where every legal continuation of a first frame can be rendered.

    labels = [world.label(n, "heldout") for n in range(64)]
    clips = ...  # uint8 [64, t, h, w, 3], generated from the first frames of world.render(label)
    scores = score(world, labels, clips)

`MEANINGS` describes each score for the footer of a table.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
from einops import rearrange

from sfv_jax.data.worlds import PALETTE, Body, Label, World
from sfv_jax.evaluation import worldnet
from sfv_jax.evaluation.frechet import MIN_SAMPLES, Moments, extrapolate, frechet_distance

Features = Callable[[np.ndarray], np.ndarray]  # from clips uint8 [b, t, h, w, 3] to [b, d]
Network = tuple[Features, dict]  # features of clips, and their description
LEGAL = 1.0  # pixels: RMS distance to the nearest legal path below which a path is legal
INTACT = 0.2  # squared error of an intact body, at most, over its squared contrast; half a contrast has 0.25
_GRID = 0.5  # pixels between the candidate positions of the object
_AROUND = 2.0  # pixels around a body in which the frame must be as the scene without it
_VISIBLE = 0.25  # share of a body's squared contrast that must not be hidden by other bodies
_SWEEPS = 3  # over the bodies of a frame; each is placed given the others

MEANINGS = {
    "distance": "RMSE in gray levels (0..255) to the nearest legal continuation, 0 is perfect",
    "fit": "share of the difference from what lies behind a body that one shape and color explain, mean over frames"
    " and bodies; 1 is best",
    "shape_kept": "share of frames in which the condition's shape fits best, mean over bodies",
    "colour_kept": "share of frames in which a body's color is nearest to the condition's, mean over bodies",
    "path_error": "RMS distance in pixels between a body's path and the nearest legal one, mean over clips and bodies",
    "intact": "share of frames in which a body is intact, wherever it is: drawn at the best place in its own size"
    f" and color, its own shape fits best and leaves at most {INTACT:.0%} of its squared contrast; mean over bodies",
    "body_error": "distance in pixels between a body and the nearest legal path, where a body that is not intact counts"
    " half the frame's side, and none counts more; mean over frames and bodies",
    "legal": f"share of clips whose bodies all follow a legal path, within {LEGAL:g} pixel",
    "directions_covered": "share of the legal directions that at least one body of a legal clip takes",
    "busiest_direction": "share of the most frequent direction of bodies in the nearest futures, 1 after mode collapse",
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
      network: the result of `worldnet.load`; or the folder of its cache, in which a missing network is trained; a
        process reads it once. None omits world-FVD.
      seed: seed of the bootstrap.
    Returns:
      `{score: number}` for the names of `MEANINGS` (`world_fvd` is None without a network, or for fewer than 20 clips)
      and `clips`, the number of clips; with world-FVD also `world_fvd_extrapolated`, `world_fvd_interval` (a pair) and
      `network` (the description of the network, with its accuracy).
    Raises:
      ValueError: if the clips do not fit the labels or the world.
    """
    clips = np.asarray(clips)
    expected = (len(labels), world.num_frames, world.size, world.size, 3)
    if clips.dtype != np.uint8 or clips.shape != expected:
        raise ValueError(f"{len(labels)} labels need clips uint8 {expected}; got {clips.dtype} {clips.shape}")
    nearest = [nearest_future(world, label, clip) for label, clip in zip(labels, clips, strict=True)]
    tracks = [track(world, scene, clip) for (_, scene), clip in zip(nearest, clips, strict=True)]
    bodies = [body for label in labels for body in label.bodies]
    kept = list(zip(bodies, itertools.chain(*tracks), strict=True))
    sightings = [sight(world, scene, clip) for (_, scene), clip in zip(nearest, clips, strict=True)]
    seen = list(zip(bodies, itertools.chain(*sightings), strict=True))
    paths = [nearest_path(world, body, found.positions) for body, found in kept]
    clipwise = [paths[n : n + world.bodies] for n in range(0, len(paths), world.bodies)]
    legal = [moves for moves in clipwise if all(error < LEGAL for error, _ in moves)]
    directions = {body.direction for moves in legal for _, body in moves}
    result = {
        "clips": len(clips),
        "distance": float(np.mean([error for error, _ in nearest])),
        "fit": float(np.mean([found.fit for _, found in kept])),
        "shape_kept": float(np.mean([[s == body.shape for s in found.shapes] for body, found in kept])),
        "colour_kept": float(np.mean([[c == body.colour for c in found.colours] for body, found in kept])),
        "path_error": float(np.mean([error for error, _ in paths])),
        "intact": float(np.mean([found.intact for _, found in seen])),
        "body_error": float(np.mean([body_error(world, body, found) for body, found in seen])),
        "legal": len(legal) / len(clips),
        "directions_covered": len(directions) / world.directions,
        "busiest_direction": busiest_direction([label for _, label in nearest], world.directions),
        "world_fvd": None,
    }
    if network is None or len(clips) < MIN_SAMPLES:
        return result
    return result | world_fvd(world, labels, clips, network=network, seed=seed)


def world_fvd(
    world: World,
    labels: list[Label],
    clips: np.ndarray,
    *,
    network: Network | Path | str,
    seed: int = 0,
    resamples: int = 100,
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
    true = _true_features(features, world, tuple(labels))

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


@lru_cache(maxsize=4)
def _true_features(features: Features, world: World, labels: tuple[Label, ...]) -> np.ndarray:
    """Returns the features `[n, futures, d]` of all legal continuations; all models of a table share them."""
    return np.stack([features(world.render_futures(label)) for label in labels])


def redrawn(world: World, labels: list[Label], seed: int = 0) -> np.ndarray:
    """Draws another true continuation of the first frame of each label: uint8 `[n, t, h, w, 3]`."""
    rng, several = np.random.default_rng(seed), [world.futures(label) for label in labels]
    return np.stack([world.render(futures[rng.integers(len(futures))]) for futures in several])


_network = lru_cache(maxsize=8)(worldnet.load)


@dataclass(frozen=True)
class Track:
    """One body as it was found in each frame of a clip.

    Attributes:
      positions: float64 `[t, 2]`, (x, y) in pixels, to half a pixel: the position that explains most.
      shapes, colours: names of the shape that explains most and of the nearest color of the world, per frame.
      fit: `[t]`, share of the squared difference from what lies behind that the body explains; 0 for an empty frame.
    """

    positions: np.ndarray
    shapes: list[str]
    colours: list[str]
    fit: np.ndarray


def track(world: World, scene: Label, frames: np.ndarray) -> list[Track]:
    """Finds each body of `scene` in each of `frames` uint8 `[t, h, w, 3]`.

    Every shape of the world is tried at every position of a grid; its color is a least-squares fit. What lies behind
    a body, and what hides it, is taken from the scene.

    Args:
      world: the world of the scene.
      scene: the legal continuation that is nearest to the frames.
      frames: the clip.
    """
    drawn = [world.stamp(body, world.positions(body)) for body in scene.bodies]
    behind = world.background(scene)
    found = []
    for n, body in enumerate(scene.bodies):
        visible = np.prod([1 - coverage for coverage, _ in drawn[n + 1 :]], axis=0) * np.ones(frames.shape[:3])
        found.append(_find(world, body, frames, behind, visible.astype(np.float32)))
        behind = world.paint(behind, body)
    return found


def _find(world: World, body: Body, frames: np.ndarray, behind: np.ndarray, visible: np.ndarray) -> Track:
    """Finds one body in `frames`, before `behind [t, h, w, 3]`, where it is `visible [t, h, w]`.

    A body of color k, coverage a and tone m makes f = (1 - a) b + a m k of what lies behind, b. The weighted squared
    error over a frame is that of f - b + a b - a m k, which is smallest for k = <f - b + a b, a m> / <a m, a m>.
    """
    places = _places(world, body)
    stamps = [world.stamp(dataclasses.replace(body, shape=shape), places) for shape in world.shapes]
    a, m = (np.concatenate(x).reshape(-1, world.size**2) for x in zip(*stamps, strict=True))
    m = a * m
    w = visible.reshape(len(frames), -1, 1)
    b = behind.reshape(len(frames), -1, 3)
    rest = frames.reshape(b.shape).astype(np.float32) - b

    def over(stamp: np.ndarray, x: np.ndarray) -> np.ndarray:  # [p, k], [t, k, c] -> [t, p, c]
        return rearrange(stamp @ rearrange(x, "t k c -> k (t c)"), "p (t c) -> t p c", c=x.shape[-1])

    weight = np.maximum(over(m * m, w), 1e-6)
    overlap = over(m, w * rest) + over(a * m, w * b)
    hidden = over(a, 2 * w * (rest * b).sum(-1, keepdims=True)) + over(a * a, w * (b * b).sum(-1, keepdims=True))
    explained = np.square(overlap).sum(-1) / weight[..., 0] - hidden[..., 0]
    best = explained.argmax(1)
    rows = np.arange(len(frames))
    energy = (w * np.square(rest)).sum((1, 2))
    color = overlap[rows, best] / weight[rows, best]
    palette = np.array([PALETTE[name] for name in world.colours], np.float32)
    nearest = np.square(color[:, None] - palette).sum(-1).argmin(1)
    return Track(
        positions=places[best % len(places)],
        shapes=[world.shapes[n] for n in best // len(places)],
        colours=[world.colours[n] for n in nearest],
        fit=explained[rows, best] / np.maximum(energy, 1.0),
    )


def _places(world: World, body: Body) -> np.ndarray:
    """Returns the candidate positions `[p, 2]` of a body, (x, y) in pixels."""
    low, high = world.bounds(body.radius)
    line = np.linspace(low, high, int(np.ceil((high - low) / _GRID)) + 1)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Sighting:
    """One body as it is best drawn into each frame of a clip, in its own size, shape and color.

    Attributes:
      positions: float64 `[t, 2]`, (x, y) in pixels, to half a pixel.
      error: `[t]`, squared error of the drawing in and around the body over the body's squared contrast with what
        lies behind it, where other bodies do not hide it.
      intact: bool `[t]`, whether the error is at most `INTACT`, no other shape has a smaller one at this place, and
        enough of the body is visible.
    """

    positions: np.ndarray
    error: np.ndarray
    intact: np.ndarray


def sight(world: World, scene: Label, frames: np.ndarray) -> list[Sighting]:
    """Draws all bodies of `scene` where they explain `frames` uint8 `[t, h, w, 3]` best, each frame by itself.

    Of the scene's motion only the drift of the background matters. All positions of a grid are tried for one body after
    another, given those of the others, and three times around: nothing needs to be where the scene has it.
    """
    bodies, behind = scene.bodies, world.background(scene)
    places = [_places(world, body) for body in bodies]
    stamps = [world.stamp(body, some) for body, some in zip(bodies, places, strict=True)]
    chosen: dict[int, np.ndarray] = {}

    def over(frames: np.ndarray, n: int) -> np.ndarray:
        coverage, tone = (x[chosen[n]][..., None] for x in stamps[n])
        return frames + coverage * (tone * _color(bodies[n]) - frames)

    def around(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what lies behind body n, what the others leave to explain, and how visible it is, where they are."""
        base = reduce(over, [k for k in sorted(chosen) if k < n], behind)
        rest, visible = base, np.ones((*frames.shape[:3], 1), np.float32)
        for k in [k for k in sorted(chosen) if k > n]:
            rest, visible = over(rest, k), visible * (1 - stamps[k][0][chosen[k]][..., None])
        return base, frames - rest, visible

    for n in [*range(len(bodies))] * _SWEEPS:
        chosen[n] = _best_place(stamps[n], _color(bodies[n]), *around(n))
    return [_judge(world, body, places[n][chosen[n]], *around(n)) for n, body in enumerate(bodies)]


def _color(body: Body) -> np.ndarray:
    return np.array(PALETTE[body.colour], np.float32)


def _best_place(stamp, color: np.ndarray, base: np.ndarray, rest: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Returns the index `[t]` of the place where a body reduces the squared error most.

    A body of color k, coverage a and tone m changes what lies behind it, b, by a m k - a b, of which v is visible. So
    the squared error of the rest, r, grows by |v (a m k - a b)|^2 - 2 <r, v (a m k - a b)>.

    Args:
      stamp: a and m at each place, `[p, h, w]`.
      color: k.
      base, rest: b and r, float32 `[t, h, w, 3]`.
      visible: v, float32 `[t, h, w, 1]`.
    """
    a, m = (x.reshape(len(x), -1) for x in stamp)
    r, b = visible * rest, visible * base
    v = visible[..., 0] * np.sqrt(color @ color)

    def over(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # [p, k], [t, h, w] -> [p, t]
        return x @ y.reshape(len(y), -1).T

    grown = over(a * a * m * m, v * v) - over(a * a * m, 2 * (b @ color) * visible[..., 0])
    grown += over(a * a, (b * b).sum(-1)) - over(a * m, 2 * (r @ color)) + over(a, 2 * (r * base).sum(-1))
    return grown.argmin(0)


def _judge(
    world: World, body: Body, positions: np.ndarray, base: np.ndarray, rest: np.ndarray, visible: np.ndarray
) -> Sighting:
    """Judges a body at `positions [t, 2]`; the other arguments are those of `_best_place`."""
    window = world.stamp(dataclasses.replace(body, shape="disc", radius=body.radius + _AROUND), positions)[0]
    drawn = {}
    for shape in world.shapes:
        coverage, tone = (x[..., None] for x in world.stamp(dataclasses.replace(body, shape=shape), positions))
        drawn[shape] = coverage * (tone * _color(body) - base)
    wrong = {
        k: (window * np.square(rest - visible * x).sum(-1) * visible[..., 0] ** 2).sum((1, 2)) for k, x in drawn.items()
    }
    seen, whole = (np.square(x).sum((1, 2, 3)) for x in (visible * drawn[body.shape], drawn[body.shape]))
    error = wrong[body.shape] / np.maximum(seen, 1.0)
    best = wrong[body.shape] <= np.min([*wrong.values()], axis=0)
    return Sighting(positions, error, (error <= INTACT) & best & (seen >= _VISIBLE * whole))


def body_error(world: World, body: Body, found: Sighting) -> float:
    """Returns the mean distance in pixels of a body from the legal path for which it is smallest.

    This is the OSPA metric of multi-object tracking (Schuhmacher et al., 2008) for one object, of order 1 and with half
    the side of the frame as cutoff: frames in which the body is not intact count the cutoff, and none counts more.
    """
    cutoff = world.size / 2
    distances = [np.linalg.norm(world.positions(moved) - found.positions, axis=1) for moved in world.motions(body)]
    return min(float(np.where(found.intact, np.minimum(some, cutoff), cutoff).mean()) for some in distances)


def nearest_path(world: World, body: Body, positions: np.ndarray) -> tuple[float, Body]:
    """Returns (RMS distance in pixels, body) of the legal motion whose path is nearest to `positions [t, 2]`."""
    motions = world.motions(body)
    errors = [np.sqrt(np.square(world.positions(moved) - positions).sum(-1).mean()) for moved in motions]
    best = int(np.argmin(errors))
    return float(errors[best]), motions[best]


def nearest_future(world: World, label: Label, frames: np.ndarray) -> tuple[float, Label]:
    """Returns (RMSE in gray levels, label) of the legal continuation nearest to `frames`, uint8 `[t, h, w, 3]`.

    Zero means a perfect video. An average of the futures is far from each of them, so a blur scores badly although it
    minimizes the expected error against any one truth.
    """
    errors = np.square(world.render_futures(label).astype(np.float32) - frames.astype(np.float32)).mean((1, 2, 3, 4))
    best = int(np.argmin(errors))
    return math.sqrt(errors[best]), world.futures(label)[best]


def busiest_direction(labels: list[Label], directions: int) -> float:
    """Returns the largest share of one direction among the bodies of `labels`.

    It is 1 / directions if all are taken alike, and 1 after mode collapse.
    """
    taken = [body.direction for label in labels for body in label.bodies]
    return float(np.bincount(taken, minlength=directions).max() / len(taken))

"""Which score sees which damage: true clips of the procedural world, damaged in known ways, by every score.

    python -m tests.score_sight --out runs/score_sight [--clips 64] [--only smeared,frozen] [--models world:1]

Every set has the same held-out first frames. `truth` is another legal future of each than the reference's, and all
damages but `frozen` and `smeared` are done to the clips of `truth`, behind the first frame, which stays right. A score
sees a damage if the damaged set scores outside the range of 100 redraws of truth (distances: above it): for each first
frame one of its true futures, for distances of two sets two. Such numbers are bold.

Measurements are stored in `--out`, so `--only` and `--scores` can make the tables in parts. They are reused for the
same clips; name another folder after a change of a score. `--models` adds models by their names or folders, with their
sampling steps. I3D needs the extra `fvd`, flow OpenCV; world-FVD is measured if `--network` names a folder, in which
its network is trained if it is missing.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sfv_jax.data.worlds import Body, Label, World
from sfv_jax.evaluation import fvd, worldnet
from sfv_jax.evaluation import world as exact
from sfv_jax.evaluation.features import compute
from sfv_jax.evaluation.frechet import Moments, frechet_distance
from sfv_jax.evaluation.mmd import pair_distances, squared_mmd
from sfv_jax.evaluation.no_reference import score_clip
from sfv_jax.reproduction.experiments import SCENES
from sfv_jax.runtime import compilation
from sfv_jax.runtime.files import replacing
from sfv_jax.runtime.progress import progress
from sfv_jax.sampling import Sampler

DRAWS = 3  # true futures of each first frame, beside the reference
REDRAWS = 100
CLIPWISE = ("distance", "fit", "shape_kept", "colour_kept", "path_error", "intact", "body_error", "legal")
PLAIN = ("motion_energy", "flow", "warp_error", "unmatched", "frozen", "detail_last", "contrast_last")
DISTANCES = ("FVD", "MMD", "pairs")

Redraw = Callable[[Label], Label]


class Damages:
    """Sets of clips uint8 `[n, t, h, w, 3]` with the first frames of the held-out clips 0 to n - 1.

    `labels` describes the held-out clips, `futures` the clips of `truth`.
    """

    def __init__(self, world: World, n: int):
        self.world, self.rng = world, np.random.default_rng(0)
        self.reference, self.labels = world.batch(range(n), "heldout")
        self.draws = [[self._one(world.futures(label)) for label in self.labels] for _ in range(DRAWS)]
        self.futures = self.draws[0]
        self.truth = self.render(lambda label: label)

    def all(self) -> dict[str, np.ndarray]:
        """Returns the sets by name; those of true clips first."""
        world, truth, t = self.world, self.truth, self.world.num_frames
        turned = dataclasses.replace(world, angle_offset=world.angle_offset + 180 / world.directions)
        soft = lambda x: np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(1)))  # noqa: E731
        smeared = [world.render_futures(label).mean(0) for label in self.labels]
        tints = self.rng.normal(0, 17, (len(truth), 1, 1, 1, 3))
        orders = [np.r_[0, 1 + self.rng.permutation(t - 1)] for _ in truth]
        true = [np.stack([world.render(label) for label in draw]) for draw in self.draws]
        return {
            **{f"truth {n + 1}" if n else "truth": clips for n, clips in enumerate(true)},
            "one direction": self.render(self.alike),
            "frozen": np.repeat(self.reference[:, :1], t, axis=1),
            "shuffled in time": np.stack([x[order] for x, order in zip(truth, orders, strict=True)]),
            "illegal direction": self.render(lambda label: label, turned),
            "wrong path": self.render(self.elsewhere),
            "other shapes": self.render(self.reshaped),
            "other colors": self.render(self.recolored),
            "pixel noise": self.behind_first(truth + self.rng.normal(0, 10, truth.shape)),
            "tinted": self.behind_first(truth + tints),
            "blurred": self.behind_first(np.stack([[soft(frame) for frame in clip] for clip in truth])),
            "two futures averaged": self.behind_first((truth.astype(np.float32) + true[1]) / 2),
            "smeared": self.behind_first(np.stack(smeared)),
        }

    def behind_first(self, clips: np.ndarray) -> np.ndarray:
        """Returns `clips` rounded, with the right first frames."""
        clips = np.clip(np.rint(clips), 0, 255).astype(np.uint8)
        clips[:, 0] = self.reference[:, 0]
        return clips

    def render(self, change: Redraw, world: World | None = None) -> np.ndarray:
        """Returns the clips of `truth` with changed labels, behind the right first frames."""
        world = world or self.world
        return self.behind_first(np.stack([world.render(change(label)) for label in self.futures]))

    def alike(self, label: Label) -> Label:
        """Returns the future in which everything goes in direction 0."""
        return dataclasses.replace(_bodies(label, lambda body: dataclasses.replace(body, direction=0)), pan=0)

    def elsewhere(self, label: Label) -> Label:
        """Returns `label` with bodies that move like others, but start at other places."""

        def start(body: Body) -> Body:
            x, y = self.rng.uniform(*self.world.bounds(body.radius), 2)
            return dataclasses.replace(body, start=(float(x), float(y)))

        return _bodies(label, start)

    def reshaped(self, label: Label) -> Label:
        """Returns `label` with another shape of each body."""
        other = lambda shape: self._one([x for x in self.world.shapes if x != shape])  # noqa: E731
        return _bodies(label, lambda body: dataclasses.replace(body, shape=other(body.shape)))

    def recolored(self, label: Label) -> Label:
        """Returns `label` with colors that none of its bodies has, all different."""
        taken = {body.colour for body in label.bodies}
        left = iter(self.rng.permutation([x for x in self.world.colours if x not in taken]))
        return _bodies(label, lambda body: dataclasses.replace(body, colour=str(next(left))))

    def _one(self, several: list):
        return several[self.rng.integers(len(several))]


def _bodies(label: Label, change: Callable[[Body], Body]) -> Label:
    return dataclasses.replace(label, bodies=tuple(map(change, label.bodies)))


def exactly(world: World, labels: list[Label], clips: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the scores of each clip, `exact [n, scores]`, and the `directions` of its nearest future."""
    scores, directions = [], []
    with progress(len(clips), "clips scored exactly") as advance:
        for label, clip in zip(labels, clips, strict=True):
            found = exact.score(world, [label], clip[None])
            scores.append([found[name] for name in CLIPWISE])
            directions.append([body.direction for body in exact.nearest_future(world, label, clip)[1].bodies])
            advance(1)
    return {"exact": np.array(scores), "directions": np.array(directions)}


def plainly(clips: np.ndarray) -> np.ndarray:
    """Returns the scores without a reference of each clip, `[n, scores]`."""
    found = [score_clip(clip, clip[0])[0] for clip in clips]
    return np.array([[scores[name] for name in PLAIN] for scores in found])


def kept(path: Path, clips: np.ndarray, parts: dict[str, Callable]) -> dict[str, np.ndarray]:
    """Returns the arrays that the functions of `parts` make of `clips`; those in `path` of these clips are reused."""
    digest, found = hashlib.sha256(clips.tobytes()).hexdigest(), {}
    if path.is_file():
        with np.load(path) as file:
            found = dict(file) if str(file["digest"]) == digest else {}
    missing = [name for name in parts if name not in found]
    for name in missing:
        made = parts[name](clips)
        found |= made if isinstance(made, dict) else {name: made}
    if missing:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **found | {"digest": digest})
    return found


def distances(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Returns the `DISTANCES` of features `[n, d]` of two sets with the same first frames."""
    moments = Moments.of(x), Moments.of(y)
    return [frechet_distance(*moments), squared_mmd(x, y, paired=True), float(pair_distances(x, y).mean())]


def redraw(rng: np.random.Generator, several: np.ndarray, count: int) -> list[np.ndarray]:
    """Returns `count` sets `[n, ...]`, each with one of `several [draws, n, ...]` per clip, and none of them twice."""
    order = rng.permuted(np.tile(np.arange(len(several))[:, None], several.shape[1]), axis=0)
    return [several[order[k], np.arange(several.shape[1])] for k in range(count)]


def busiest(directions: np.ndarray, world: World) -> float:
    """Returns the share of the most frequent of `directions [n, bodies]`."""
    return float(np.bincount(directions.ravel(), minlength=world.directions).max() / directions.size)


def scored(world: World, sets: dict[str, dict], futures: np.ndarray | None) -> dict[str, dict[str, dict]]:
    """Returns `{table: {score: {set: number}}}`, with the range over redraws of truth as the set "range".

    Args:
      world: the world.
      sets: measurements by set, "reference" and those of true clips among them.
      futures: features `[n, futures, d]` of all futures, for world-FVD.
    """
    rng, true = np.random.default_rng(1), [x for name, x in sets.items() if is_true(name)]
    result: dict[str, dict[str, dict]] = {}

    def add(table: str, names, key: str, value: Callable, count: int = 1) -> None:
        """Adds scores, the `value` of one set of measurements `key`, or of two."""
        if not all(key in x for x in sets.values()):
            return
        several, first = np.stack([x[key] for x in true]), sets["reference"][key]
        draws = np.array([value(*redraw(rng, several, count)) for _ in range(REDRAWS)])
        found = {name: {"range": (x.min(), x.max())} for name, x in zip(names, draws.T, strict=True)}
        for one in [one for one in sets if one != "reference"]:
            for name, number in zip(names, value(*[first, sets[one][key]][2 - count :]), strict=True):
                found[name][one] = number
        result.setdefault(table, {}).update(found)

    add("distances", DISTANCES, "i3d", distances, 2)
    if futures is not None:
        whole = Moments.of(futures.reshape(-1, futures.shape[-1]))
        add("distances", ["world-FVD"], "world", lambda x: [frechet_distance(whole, Moments.of(x))])
    add("exact", CLIPWISE, "exact", lambda x: x.mean(0))
    add("exact", ["busiest"], "directions", lambda x: [busiest(x, world)])
    add("plain", PLAIN, "plain", lambda x: x.mean(0))
    return result


def is_true(name: str) -> bool:
    """Returns whether a set has true clips."""
    return name.split()[0] in ("reference", "truth")


def table(found: dict[str, dict], below: bool = True) -> str:
    """Returns a Markdown table of scores; numbers above the range of truth are bold, and those `below` it, if asked."""
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in (scores["range"] for scores in found.values())]
    lines = [["", *(name.replace("_", " ") for name in found)], ["---", *["---:"] * len(found)]]
    lines += [["range of truth", *ranges]]
    for one in [one for one in next(iter(found.values())) if one != "range"]:
        lines.append([one, *(cell(scores, one, below) for scores in found.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(scores: dict[str, Any], one: str, below: bool = True) -> str:
    """Returns the number of a set, bold if it is above the range of truth, or `below` it."""
    low, high = scores["range"]
    margin = 1e-6 * max(1.0, abs(low), abs(high))
    seen = scores[one] > high + margin or (below and scores[one] < low - margin)
    return f"**{scores[one]:.3g}**" if seen else f"{scores[one]:.3g}"


load = lru_cache(maxsize=1)(Sampler.load)


def generated(reference: np.ndarray, model: str) -> np.ndarray:
    """Returns clips of a model, "NAME:STEPS", from the first frames of `reference`; clip k has seed k."""
    name, _, steps = model.rpartition(":")
    sampler, parts = load(name), []
    for first in range(0, len(reference), 16):
        images = list(reference[first : first + 16, 0])
        seeds = [first + n for n in range(len(images))]
        parts.append(sampler(images, seed=seeds, steps=int(steps), noise_aug_strength=0.0))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--only", default="", help="sets to measure now, with commas; the true ones always are")
    parser.add_argument("--scores", default="i3d,exact,plain", help="kinds of scores to measure now")
    parser.add_argument("--models", default="", help="NAME:STEPS with commas: models to score beside the damages")
    parser.add_argument("--network", type=Path, help="folder of world-FVD's network")
    asked = parser.parse_args()
    world = World(**SCENES)
    damages, only = Damages(world, asked.clips), [x for x in asked.only.split(",") if x]
    models = [model for model in asked.models.split(",") if model]
    sets = {"reference": damages.reference} | damages.all() | dict.fromkeys(models)
    if unknown := sorted(set(only) - set(sets)):
        parser.error(f"no sets {unknown}; there are {', '.join(sets)}")
    compilation.set_up()
    asked.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable] = {"exact": partial(exactly, world, damages.labels), "plain": plainly}
    if "i3d" in asked.scores:
        parts["i3d"] = partial(compute, fvd.load_i3d(None)[0])
    futures = None
    if asked.network:
        parts["world"], about = worldnet.load(world, asked.network)
        print(f"network of world-FVD: {about['accuracy']}, trained in {about['seconds']:.0f} s")
        of_all = lambda _: np.stack([parts["world"](world.render_futures(label)) for label in damages.labels])  # noqa: E731
        futures = kept(asked.out / f"futures-{asked.clips}.npz", damages.reference, {"futures": of_all})["futures"]
    wanted = {name: part for name, part in parts.items() if name in (*asked.scores.split(","), "world")}
    found = {}
    for name, clips in sets.items():
        path = asked.out / f"{name.replace('/', '--')}-{asked.clips}.npz"
        if not only or name in (*only, *models) or is_true(name) or path.is_file():
            print(name, flush=True)
            found[name] = kept(path, generated(damages.reference, name) if clips is None else clips, wanted)
    print(f"\n{asked.clips} held-out first frames; bold: outside the range of {REDRAWS} redraws of truth")
    for kind, scores in scored(world, found, futures).items():
        print(f"\n{table(scores, below=kind != 'distances')}")


if __name__ == "__main__":
    main()

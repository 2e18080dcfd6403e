"""How videos drift when they are extended: a table over settings and numbers of chunks, in the procedural world.

    python -m tests.extension_drift --checkpoint runs/world_teacher --steps 25 [--color keep,match] [--noise 0.02,0.1]

Held-out first frames of the checkpoint's world are extended. The model sees one frame at a time, so the truth of a
chunk is every legal continuation of the frame that it starts from: shapes are first found in that frame, near the end
of the legal continuation that the chunk before is nearest to. The first lines are true clips, for comparison.

  distance     RMSE in gray levels of the chunk to its nearest legal continuation
  kept         share of bodies that their own shape and color explain best in the last frame, of all shapes and colors
  detail, contrast, frozen  of the video up to there, `sfv_jax.evaluation.no_reference`
  color        mean difference of the channels' means between the last frame and the image, in gray levels
  motion       motion energy within the chunk, in gray levels
  seam         motion over the chunk's seam by that within the chunk: 1 is even, 0 is a frame twice
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np

from sfv_jax.checkpoints.base import training_config, world_rules
from sfv_jax.config_check import checked_world
from sfv_jax.data.worlds import Label, World
from sfv_jax.evaluation.motion import motion_energy
from sfv_jax.evaluation.no_reference import score_clip
from sfv_jax.evaluation.world import nearest_future
from sfv_jax.sampling import Sampler
from sfv_jax.sampling.extension import Extension

REACH = np.linspace(-1.5, 1.5, 7)  # pixels around the expected place in which bodies and background are looked for
COLUMNS = ("distance", "kept", "detail", "contrast", "color", "motion", "seam", "frozen")


def moved(world: World, label: Label, n: int, shift: tuple[float, float], frames: int) -> Label:
    """Returns `label` after `frames` frames, with body `n` (the background: -1) moved by `shift` in pixels."""
    long = dataclasses.replace(world, num_frames=frames + 1)
    bodies = []
    for k, body in enumerate(label.bodies):
        x, y = long.positions(body)[-1] + (shift if k == n else (0, 0))
        low, high = world.bounds(body.radius)
        x, y = float(np.clip(x, low, high)), float(np.clip(y, low, high))
        turn = body.turn + (x - body.start[0]) / body.radius if world.rolling else body.turn
        bodies.append(dataclasses.replace(body, start=(x, y), turn=turn))
    angle = 2 * math.pi * label.pan / world.pans
    drift = world.pan_speed * frames * np.array([math.cos(angle), math.sin(angle)]) + (shift if n == -1 else (0, 0))
    waves = [
        dataclasses.replace(wave, phase=float(wave.phase - 2 * math.pi / world.size * drift @ wave.periods))
        for wave in label.waves
    ]
    return dataclasses.replace(label, bodies=tuple(bodies), waves=tuple(waves))


def error(world: World, label: Label, frame: np.ndarray) -> float:
    """Returns the mean squared error of `frame` uint8 `[h, w, 3]` as the first one of `label`."""
    return float(np.square(world.render(label, slice(0, 1))[0].astype(np.float32) - frame).mean())


def found(world: World, label: Label, frame: np.ndarray) -> Label:
    """Returns `label` with background and bodies where they are in `frame`, one after another, within `REACH`."""
    shifts = list(itertools.product(REACH, REACH))
    for n in (-1, *range(len(label.bodies))):
        tried = [moved(world, label, n, shift, 0) for shift in shifts]
        label = min(tried, key=lambda one: error(world, one, frame))
    return label


def kept(world: World, label: Label, frame: np.ndarray) -> float:
    """Returns the share of bodies that no other shape or color explains better in `frame`."""
    right = []
    for n, body in enumerate(label.bodies):
        looks = list(itertools.product(world.shapes, world.colours))
        others = [dataclasses.replace(body, shape=shape, colour=colour) for shape, colour in looks]
        scenes = [dataclasses.replace(label, bodies=(*label.bodies[:n], x, *label.bodies[n + 1 :])) for x in others]
        best = min(range(len(looks)), key=lambda k: error(world, scenes[k], frame))
        right.append(looks[best] == (body.shape, body.colour))
    return float(np.mean(right))


def drift(world: World, label: Label, frames: np.ndarray, wanted: Iterable[int]) -> dict[int, dict[str, float]]:
    """Returns `{chunk: {score: number}}` of one extended video, uint8 `[t + n (t - 1), h, w, 3]`."""
    t, image, result = world.num_frames, world.render(label, slice(0, 1))[0], {}
    for n in range(max(wanted) + 1):
        start = n * (t - 1)
        chunk = frames[start : start + t]
        distance, nearest = nearest_future(world, label, chunk)
        label = found(world, moved(world, nearest, -2, (0, 0), t - 1), chunk[-1])
        if n not in wanted:
            continue
        scores, _ = score_clip(frames[: start + t], image, flow=False)
        steps = np.abs(np.diff(frames[max(start - 1, 0) : start + t].astype(float), axis=0)).mean((1, 2, 3))
        inside = steps[2:] if n else steps
        means = (chunk[-1].astype(float) - image).mean((0, 1))
        result[n] = {
            "distance": distance,
            "kept": kept(world, label, chunk[-1]),
            "detail": scores["detail_last"],
            "contrast": scores["contrast_last"],
            "color": float(np.abs(means).mean()),
            "motion": motion_energy(chunk),
            "seam": float(steps[1] / max(inside.mean(), 1e-6)) if n else math.nan,
            "frozen": scores["frozen"],
        }
    return result


def table(name: str, world: World, labels: list[Label], videos: np.ndarray, wanted: list[int]) -> None:
    """Prints a line per number of chunks: the means over videos."""
    scores = [drift(world, label, frames, wanted) for label, frames in zip(labels, videos, strict=True)]
    for n in wanted:
        means = [np.mean([one[n][column] for one in scores]) for column in COLUMNS]
        cells = " | ".join("" if math.isnan(mean) else f"{mean:.2f}" for mean in means)
        print(f"| {name} | {n} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="workdir of a run in the procedural world")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--chunks", default="0,1,4,8", help="further chunks after which videos are scored")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--color", default="keep,match")
    parser.add_argument("--noise", default="0.02", help="noise_aug_strength of further chunks")
    args = parser.parse_args()
    wanted = [int(n) for n in args.chunks.split(",")]
    world = checked_world(world_rules(training_config(args.checkpoint)))
    labels = [world.label(n, "heldout") for n in range(args.clips)]
    images = [world.render(label, slice(0, 1))[0] for label in labels]
    sampler = Sampler.load(args.checkpoint)
    print(f"step {sampler.step}, {args.clips} clips, {args.steps} steps of {args.sampler}\n")
    print(f"| further chunks | n | {' | '.join(COLUMNS)} |\n|{' --- |' * 2}{' ---: |' * len(COLUMNS)}")
    length = Extension(max(wanted)).length(world.num_frames)
    long = dataclasses.replace(world, num_frames=length)
    table("truth", world, labels, np.stack([long.render(label) for label in labels]), wanted)
    for color, noise in itertools.product(args.color.split(","), map(float, args.noise.split(","))):
        extension = Extension(max(wanted), noise, color)
        videos = sampler.extend(images, extension, seed=0, steps=args.steps, sampler=args.sampler)
        table(f"{color}, noise {noise:g}", world, labels, videos, wanted)


if __name__ == "__main__":
    main()

"""Tables 1, 2 and 3 of the paper: trains what is missing, samples, scores, prints.

    python -m sfv_jax.reproduce --fast --workdir runs/reproduce
    python -m sfv_jax.reproduce --seeds 0,1,2 --workdir runs/reproduce
    python -m sfv_jax.reproduce --scale svd --svd models/svd --data data/latents --real ucf101/ --i3d i3d.pt --dry_run
    python -m sfv_jax.reproduce --scale svd ... --set mesh.fsdp=8 --set steps=20000

`--scale world`, the default, has tiny networks and the procedural world; `--fast` less training. `--scale svd` is the
published configuration on a model folder, a latent cache and, to score with FVD, a folder of real videos whose first
frames are the conditions. What a run will cost is printed first; `--dry_run` stops there. Every stage is kept: trained
models are ordinary workdirs, samples and scores files, so the same command continues after an interruption, and
changes nothing when all is there. `index.html` in the workdir shows tables, clips side by side and training curves.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from sfv_jax import experiments
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.checkpoints.run import WorkdirError
from sfv_jax.config import ConfigError, world_of
from sfv_jax.data.latents import LatentError
from sfv_jax.data.video import VideoError
from sfv_jax.evaluation import fvd, world
from sfv_jax.evaluation.clips import Reading, find_clips
from sfv_jax.evaluation.features import compute
from sfv_jax.evaluation.frechet import MIN_SAMPLES, measure
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.experiments import BASE, FAST, FULL, TABLES, Budget, Row
from sfv_jax.quickstart import picture
from sfv_jax.runtime import compilation
from sfv_jax.runtime.files import replacing, write_json
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.training.alarms import TrainingStopped
from sfv_jax.trainings import ReproduceError, Runs, plan, svd_runs, world_runs
from sfv_jax.weights.folders import WeightsError

SHOWN = 4  # conditions in strips and on the page


@dataclass(frozen=True)
class Bench:
    """Where the tables are made.

    Attributes:
      runs: the models, and where all is kept.
      truth: real clips uint8 `[n, t, h, w, 3]` at the size they are scored at; their first frames are the conditions.
      images: the conditions at full size.
      resize: of a generated clip to that size.
      score: clips like `truth` -> `fvd`, `interval` and what else `columns` (title: name) shows.
      options: of every call of the sampler.
      load: of `Sampler.load`.
      batch: videos sampled at a time.
    """

    runs: Runs
    truth: np.ndarray
    images: list[np.ndarray]
    resize: Callable[[np.ndarray], np.ndarray]
    score: Callable[[np.ndarray], dict]
    columns: dict[str, str]
    notes: list[str]
    options: dict
    load: dict
    batch: int


# ---- the two scales ----


def world_bench(workdir: Path, runs: Runs, budget: Budget) -> Bench:
    """The procedural world."""
    rules = world_of(runs.config(BASE, 0))
    truth, labels = rules.batch(range(budget.conditions), "heldout")

    def score(clips):
        found = world.score(rules, labels, clips, network=workdir / "worldnet")
        return found | {"fvd": found["world_fvd"], "interval": found["world_fvd_interval"]}

    columns = {"distance": "distance", "fit": "fit", "legal": "legal", "busiest": "busiest_direction"}
    notes = [f"{title}: {world.MEANINGS[name]}." for title, name in columns.items()]
    notes.append(f"FVD: {world.MEANINGS['world_fvd']}.")
    options = dict(noise_aug_strength=0.0)
    images, same = list(truth[:, 0]), lambda clip: clip
    return Bench(runs, truth, images, same, score, columns, notes, options, {}, 64)


def svd_bench(runs: Runs, real: str, i3d: str, size: tuple[int, int] = (576, 1024), batch: int = 8) -> Bench:
    """SVD on real videos, scored by the protocol of `evaluate` (evaluation/protocol.py) on all clips of `real`.

    `size` (height, width) is that of the videos generated.
    """
    for name, value in (("real", real), ("i3d", i3d)):
        if not value:
            raise ReproduceError(f"--scale svd needs --{name} (only --dry_run does without --real and --i3d)")
    features, about = fvd.load_i3d(i3d)
    frames = read_model(runs.base)[0]["unet"].num_frames
    protocol, reading = Protocol(n=0, num_frames=frames, height=size[0], width=size[1]), Reading(frames, Protocol.fps)
    images, truth = [], []
    for _, clip in reading.frames(find_clips(real)):
        images.append(protocol.cut(clip[0]).copy())
        truth.append(protocol.real(clip))
    if len(truth) < MIN_SAMPLES:
        least = f"FVD needs {MIN_SAMPLES} or more"
        raise ReproduceError(f"--real={real}: {len(truth)} clips of {frames} frames can be read, {least}")
    truth = np.stack(truth)
    known = compute(features, truth)

    def score(clips):
        found = measure(known, compute(features, clips), ddof=protocol.ddof)
        return {"fvd": found.value, "interval": found.interval, "extrapolated": found.extrapolated}

    mesh = make_mesh() if jax.device_count() > 1 else None
    return Bench(
        runs=runs,
        truth=truth,
        images=images,
        resize=protocol.score,
        score=score,
        columns={"extrapolated": "extrapolated"},
        notes=[
            f"FVD with {about['file']} (SHA-256 {about['sha256'][:12]}); " + json.dumps(protocol.reading()) + ".",
            *reading.unreadable,
        ],
        options=dict(height=protocol.height, width=protocol.width),
        load=dict(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16", mesh=mesh),  # CPUs emulate it
        batch=batch,
    )


# ---- stages ----


def ensure_row(bench: Bench, row: Row, seed: int, load: Callable[[], Sampler]) -> tuple[dict, np.ndarray]:
    """(record, clips) of a row: as kept, or made now by the sampler that `load` returns."""
    folder = bench.runs.folder / f"seed{seed}" / "rows" / row.key
    path = bench.runs.workdir(row.run, seed)
    trained = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else None
    origin = [str(path), trained, row.run, row.steps, row.sampler, row.guidance, seed, bench.options]
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode() + bench.truth.tobytes()).hexdigest()
    kept = folder / "row.json"
    if kept.is_file() and (record := json.loads(kept.read_text()))["digest"] == digest:
        return record, read_clips(folder, bench)
    sampler = load()
    clips = sample_clips(bench, sampler, row, seed, folder, digest)
    record = {"digest": digest} | bench.score(clips) | latency(bench, sampler, row)
    write_json(kept, record)
    return record, clips


def how(row: Row) -> dict:
    """Options of the sampler for a row."""
    return dict(steps=row.steps, sampler=row.sampler, guidance=row.guidance)


def sample_clips(bench: Bench, sampler: Sampler, row: Row, seed: int, folder: Path, digest: str) -> np.ndarray:
    """A clip for every condition, a batch per file; video n has seed 1000000 `seed` + n in every row."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(bench.images), bench.batch):
        file = folder / f"{first:06d}.npz"
        if file.is_file():
            with np.load(file) as known:
                if str(known["digest"]) == digest:
                    continue
        images = bench.images[first : first + bench.batch]
        seeds = [1_000_000 * seed + first + n for n in range(len(images))]
        clips = np.stack([bench.resize(x) for x in sampler(images, seed=seeds, **how(row), **bench.options)])
        with replacing(file) as temporary, temporary.open("wb") as out:
            np.savez_compressed(out, clips=clips, digest=digest)
    return read_clips(folder, bench)


def read_clips(folder: Path, bench: Bench) -> np.ndarray:
    """What `sample_clips` keeps."""
    clips = []
    for first in range(0, len(bench.images), bench.batch):
        with np.load(folder / f"{first:06d}.npz") as file:
            clips.append(file["clips"])
    return np.concatenate(clips)


def latency(bench: Bench, sampler: Sampler, row: Row, repeats: int = 5) -> dict:
    """Milliseconds of one video, the best of some after one that compiled: per UNet call, and from image to frames."""
    calls, wholes = [], []
    for _ in range(repeats + 1):
        times, began = {}, time.perf_counter()
        sampler(bench.images[:1], times=times, **how(row), **bench.options)
        wholes.append(time.perf_counter() - began)
        calls.append(times["denoise"] / row.steps)
    return {"ms_call": 1000 * min(calls[1:]), "ms_whole": 1000 * min(wholes[1:])}


# ---- tables ----


def summarise(records: list[dict]) -> dict:
    """One seed: its record. Several: means, and the lowest and highest FVD in place of its bootstrap interval."""
    if len(records) == 1:
        return records[0]
    names = [k for k, v in records[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    values = [record["fvd"] for record in records]
    return {k: float(np.mean([r[k] for r in records])) for k in names} | {"interval": (min(values), max(values))}


def cells(bench: Bench, row: Row, record: dict) -> list:
    """A row of a table."""
    low, high = record["interval"]
    shown = [record[name] for name in bench.columns.values()]
    interval = f"{low:.1f} to {high:.1f}"
    published, seconds = (None if x is None else f"{x:g}" for x in (row.published, row.seconds))  # as printed
    times = [record["ms_call"], record["ms_whole"], seconds]
    return [row.label, published, record["fvd"], len(bench.images), interval, *shown, *times]


def orders(rows: list[Row], found: list[dict]) -> list[str]:
    """The published and the measured order, best first."""
    both = [(row, record["fvd"]) for row, record in zip(rows, found, strict=True) if row.published is not None]
    if len(both) < 2:
        return []
    published = [row.label for row, _ in sorted(both, key=lambda pair: pair[0].published)]
    measured = [row.label for row, _ in sorted(both, key=lambda pair: pair[1])]
    same = "the same order" if published == measured else "the order differs"
    return [f"Best first, published: {' < '.join(published)}.", f"Measured: {' < '.join(measured)}: {same}."]


def curves(bench: Bench, runs: list[str], seed: int) -> dict[str, dict[str, list[float]]]:
    """`{loss: {run: values}}` over log intervals."""
    plots = {}
    for run in runs:
        file = bench.runs.workdir(run, seed) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        for name in ("loss/denoising", "loss/consistency", "loss/adversarial", "loss/reconstruction", "loss/hinge"):
            if values := [line[name] for line in lines if line.get(name) is not None]:
                plots.setdefault(name.removeprefix("loss/"), {})[run] = values
    return plots


def make_report(bench: Bench, tables: list[str], seeds: list[int], records: dict, clips: dict) -> Report:
    """Everything that was found; `records` and `clips` by row key, lists over seeds and of the first seed."""
    report = Report("Tables of SF-V, reproduced")
    several = f"means of seeds {', '.join(map(str, seeds))}; interval: lowest and highest seed"
    notes = [*bench.notes, "N: conditions, held out."]
    notes.append(f"Interval: {several}." if len(seeds) > 1 else f"Seed {seeds[0]}; interval: bootstrap, 95 %.")
    notes.append("ms: one video on this machine, warm: per UNet call (two networks where guided), and image to frames.")
    columns = ["", "published FVD", "FVD", "N", "interval", *bench.columns, "ms per call", "ms in all", "A100 s"]
    for name in tables:
        title, rows = TABLES[name]
        found = [summarise(records[row.key]) for row in rows]
        lines = [cells(bench, row, record) for row, record in zip(rows, found, strict=True)]
        report.table(title, columns, lines, orders(rows, found) + (notes if name == tables[-1] else []))
    names = dict.fromkeys(row.label for name in tables for row in TABLES[name][1] if row.key in clips)
    keys = {row.label: row.key for name in tables for row in TABLES[name][1]}
    shown = {"truth": bench.truth} | {label: clips[keys[label]] for label in names}
    grid = {f"condition {n}": {label: x[n] for label, x in shown.items()} for n in range(min(SHOWN, len(bench.images)))}
    report.clips("Side by side", grid, fps=4)
    runs = [BASE, *experiments.runs_of(tables)]
    for loss, series in curves(bench, runs, seeds[0]).items():
        report.lines(f"Training: {loss}", series, "log interval", loss)
    report.record = {"tables": tables, "seeds": seeds, "rows": records}
    picture(shown, bench.runs.folder / "strips.png")
    return report


# ---- the command ----


def ensure_run(bench: Bench, run: str, tables: list[str], seed: int) -> dict[str, tuple[dict, np.ndarray]]:
    """Trains a run and makes its rows, or what is missing of them: (record, clips) by row key."""
    bench.runs.ensure(run, seed)
    rows = {row.key: row for name in tables for row in TABLES[name][1] if row.run == run}
    load = cache(lambda: Sampler.load(bench.runs.workdir(run, seed), **bench.load))
    return {key: ensure_row(bench, row, seed, load) for key, row in rows.items()}


def cores() -> list[int]:
    """What this process may run on; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def side_by_side(arguments: list[str], folder: Path, jobs: int) -> None:
    """Runs this command `jobs` times at once, each with its share of the runs and of the cores; waits for all.

    Raises:
      TrainingStopped: if one fails, with the end of what it said (`folder/job0.log` and so on).
    """
    mine, running = cores(), []
    for n in range(jobs):
        command = [sys.executable, "-m", "sfv_jax.reproduce", *arguments, f"--share={n}/{jobs}"]
        with (folder / f"job{n}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        if mine[n::jobs]:
            os.sched_setaffinity(running[-1].pid, mine[n::jobs])
    try:
        failed = [n for n, process in enumerate(running) if process.wait()]
    finally:
        for process in running:
            process.terminate()
    if failed:
        log = folder / f"job{failed[0]}.log"
        raise TrainingStopped(f"{log}: {log.read_text().strip().splitlines()[-1:]}; the same command continues")


def reproduce(bench: Bench, tables: list[str], seeds: list[int]) -> Report:
    """All stages that are missing, and the report."""
    records, clips = {}, {}
    for seed in seeds:
        for run in [BASE, *experiments.runs_of(tables)]:
            for key, (record, made) in ensure_run(bench, run, tables, seed).items():
                records.setdefault(key, []).append(record)
                clips.setdefault(key, made[:SHOWN])
    report = make_report(bench, tables, seeds, records, clips)
    report.write(bench.runs.folder)
    return report


def default_jobs(scale: str) -> int:
    """Processes side by side: one per core for tiny networks, which use two cores badly; else one, which uses all."""
    return min(4, len(cores()) or os.cpu_count() or 1) if scale == "world" and jax.default_backend() == "cpu" else 1


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    compilation.set_up()
    tables, began, workdir = FLAGS.only, time.monotonic(), Path(FLAGS.workdir)
    try:
        unknown = [name for name in tables if name not in TABLES]
        if unknown or not FLAGS.seeds:
            raise ReproduceError(f"--only={','.join(unknown)}: choose from {', '.join(TABLES)}; --seeds: one or more")
        seeds = [int(seed) for seed in FLAGS.seeds]
        if FLAGS.share and not re.fullmatch(r"\d+/[1-9]\d*", FLAGS.share):
            raise ReproduceError(f"--share={FLAGS.share}: write K/N, such as 0/2 for every second run from the first")
        budget = FAST if FLAGS.fast else FULL
        if FLAGS.scale == "world":
            runs = world_runs(workdir / ("fast" if FLAGS.fast else "full"), budget, FLAGS.set)
        elif FLAGS.svd and FLAGS.data:
            runs = svd_runs(workdir / "svd", FLAGS.svd, FLAGS.data, FLAGS.set)
        else:
            raise ReproduceError("--scale svd needs --svd MODEL and --data CACHE")
        methods = [(run, seed) for seed in seeds for run in experiments.runs_of(tables)]
        todo = methods + [(BASE, seed) for seed in seeds]  # of the base model only the rows
        jobs = min(FLAGS.jobs or default_jobs(FLAGS.scale), len(methods))
        if not FLAGS.share:
            print("\n".join(plan(runs, tables, seeds, jobs)), flush=True)
        if FLAGS.dry_run:
            return
        if FLAGS.scale == "world":
            bench = world_bench(workdir, runs, budget)
        else:
            bench = svd_bench(runs, FLAGS.real, FLAGS.i3d, (FLAGS.height, FLAGS.width), FLAGS.batch_size)
        if FLAGS.share:
            first, of = map(int, FLAGS.share.split("/"))
            if first and runs.trains_base and not runs.done(BASE, 0):
                raise ReproduceError(
                    f"--share={FLAGS.share}: {runs.base} is not trained yet; --share=0/{of} does it first"
                )
            runs.ensure(BASE, 0)
            for run, seed in todo[first::of]:
                ensure_run(bench, run, tables, seed)
            return
        if jobs > 1 and not all(runs.done(run, seed) for run, seed in methods):
            with ThreadPoolExecutor(1) as beside:
                scored = beside.submit(bench.score, bench.truth)  # trains what scores: all jobs would at once
                runs.ensure(BASE, 0)
            scored.result()
            print(f"{len(methods)} runs, {jobs} at a time: see {runs.folder}/job*.log", flush=True)
            side_by_side(sys.argv[1:], runs.folder, jobs)
        reproduce(bench, tables, seeds)
    except (
        ConfigError,
        LatentError,
        ReproduceError,
        TrainingStopped,
        VideoError,
        WeightsError,
        WorkdirError,
        ValueError,
    ) as error:
        sys.exit(f"reproduce: {error}")
    print("\n" + (bench.runs.folder / "scores.md").read_text())
    minutes = (time.monotonic() - began) / 60
    print(f"Look at {bench.runs.folder / 'index.html'} and strips.png. {minutes:.1f} minutes this time.")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", "runs/reproduce", "folder for everything that is made")
    flags.DEFINE_enum("scale", "world", ["world", "svd"], "tiny networks in the procedural world, or SVD itself")
    flags.DEFINE_bool("fast", False, "world: rougher tables, less training")
    flags.DEFINE_list("only", ["table1", "table2", "table3"], f"which tables: {', '.join(TABLES)}")
    flags.DEFINE_list("seeds", ["0"], "of training (the base model has one) and of the samples")
    flags.DEFINE_bool("dry_run", False, "print the plan and its cost, and stop")
    flags.DEFINE_string("svd", None, "svd: model folder")
    flags.DEFINE_string("data", None, "svd: latent cache to train on")
    flags.DEFINE_string("real", None, "svd: folder of real videos; their first frames are the conditions")
    flags.DEFINE_string("i3d", None, "svd: I3D weights for FVD")
    flags.DEFINE_integer("height", 576, "svd: of the videos sampled, multiples of 64")
    flags.DEFINE_integer("width", 1024, "svd: of the videos sampled, multiples of 64")
    flags.DEFINE_integer("batch_size", 8, "svd: videos sampled at a time", lower_bound=1)
    flags.DEFINE_integer(
        "jobs", None, "runs at a time; default: in the world on CPU one per core, at most 4", lower_bound=1
    )
    flags.DEFINE_string("share", None, "K/N: only every Nth run, from run K, and no tables: what --jobs starts")
    flags.DEFINE_multi_string("set", [], "config field of every training run, such as mesh.fsdp=8; may be repeated")


if __name__ == "__main__":
    _define_flags()
    compilation.define_flags()
    app.run(main)

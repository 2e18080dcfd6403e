"""Requests of the command `reproduce`: missing runs and rows, made one after another or in processes side by side."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax
import numpy as np

from sfv_jax.checkpoints.decoders import find_decoder
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.checkpoints.run import LOCK
from sfv_jax.config import world_of
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import kinetics
from sfv_jax.evaluation.features import load_features
from sfv_jax.evaluation.report import Report
from sfv_jax.reproduction import experiments
from sfv_jax.reproduction.experiments import BASE, FAST, FULL, SCENES_FAST, SCENES_FULL, TABLES
from sfv_jax.reproduction.rows import SHOWN, Bench, ensure_row, svd_bench, world_bench
from sfv_jax.reproduction.runs import ReproduceError, Runs, plan, scenes_runs, svd_runs, world_runs
from sfv_jax.reproduction.tables import make_report
from sfv_jax.runtime.locks import Lock
from sfv_jax.runtime.stopping import CHILDREN
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.training.alarms import TrainingStopped


@dataclass(frozen=True)
class Request:
    """The flags of the command `reproduce`, whose help texts describe the fields.

    Attributes:
      only: keys of `TABLES`.
      share: (k, n) for every nth run from run k, without tables; None for all runs and the tables.
      settings: changes of config fields, "name=value" each; `--set`.
      arguments: the command line, which `side_by_side` repeats.
    """

    workdir: Path
    scale: str = "world"
    fast: bool = False
    only: tuple[str, ...] = ("table1", "table2", "table3")
    seeds: tuple[int, ...] = (0,)
    dry_run: bool = False
    svd: str | None = None
    data: str | None = None
    real: str | None = None
    i3d: str | None = None
    batch_norm_eps: float | None = None
    allow_torchscript: bool = False
    height: int = 576
    width: int = 1024
    batch_size: int = 8
    jobs: int | None = None
    share: tuple[int, int] | None = None
    settings: tuple[str, ...] = ()
    decoder: str = "full"
    arguments: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.only if name not in TABLES]
        if unknown or not self.seeds:
            raise ReproduceError(f"--only={','.join(unknown)}: choose from {', '.join(TABLES)}; --seeds: one or more")

    @property
    def budget(self) -> experiments.Budget:
        """Amount of training in the world or on the scenes."""
        if self.scale == "scenes":
            return SCENES_FAST if self.fast else SCENES_FULL
        return FAST if self.fast else FULL


def run(request: Request) -> None:
    """Prints the plan, makes the missing runs and rows, and prints the tables.

    Raises:
      UserError: if the request is impossible, its files cannot be used, or another process makes the same tables.
      TrainingStopped: if a run was stopped or a process failed.
    """
    began, runs = time.monotonic(), runs_for(request)
    methods = [(name, seed) for seed in request.seeds for name in experiments.runs_of(request.only)]
    jobs = min(request.jobs or default_jobs(request.scale), len(methods))
    if not request.share:
        print("\n".join(plan(runs, request.only, request.seeds, jobs, request.decoder)), flush=True)
    if request.dry_run:
        return
    bench = bench_for(request, runs)
    if request.share:  # each run has its own lock
        _run_share(request, bench, methods)
        return
    runs.folder.mkdir(parents=True, exist_ok=True)
    with Lock(runs.folder / LOCK, str(runs.folder)):
        _run_all(request, bench, methods, jobs)
    minutes = (time.monotonic() - began) / 60
    print(f"Look at {runs.folder / 'index.html'} and strips.png. {minutes:.1f} minutes this time.")


def _run_all(request: Request, bench: Bench, methods: list[tuple[str, int]], jobs: int) -> None:
    """Makes all missing runs, `jobs` at a time, and rows, and prints the tables."""
    runs = bench.runs
    if jobs > 1 and not all(runs.done(*method) for method in methods):
        with ThreadPoolExecutor(1) as beside:
            scored = beside.submit(bench.score, bench.truth)  # trains the network of the scores once, not in every job
            runs.ensure(BASE, 0)
        scored.result()
        print(f"{len(methods)} runs, {jobs} at a time: see {runs.folder}/job*.log", flush=True)
        side_by_side(request.arguments, runs.folder, jobs)
    reproduce(bench, request.only, request.seeds)
    print("\n" + (runs.folder / "scores.md").read_text(encoding="utf-8"))


def runs_for(request: Request) -> Runs:
    """Returns the training runs at the scale of a request.

    Raises:
      ReproduceError: if a folder is not given.
    """
    amount = "fast" if request.fast else "full"
    if request.scale == "world":
        return world_runs(request.workdir / amount, request.budget, request.settings)
    if request.scale == "scenes":
        return scenes_runs(request.workdir / f"scenes-{amount}", request.budget, request.settings)
    if request.svd and request.data:
        return svd_runs(request.workdir / "svd", request.svd, request.data, request.settings)
    raise ReproduceError("--scale svd needs --svd MODEL and --data CACHE")


def bench_for(request: Request, runs: Runs) -> Bench:
    """Returns the bench at the scale of a request.

    Raises:
      ReproduceError: if a folder or file is not given, or too few clips can be read.
      WeightsError: if the decoder is none of the model's latents.
    """
    conditions = request.budget.conditions
    if request.scale == "world":
        return world_bench(request.workdir, runs, world_of(runs.config(BASE, 0)), conditions)
    about = {} if request.decoder == "full" else find_decoder(request.decoder, read_model(runs.base)).record()
    if request.scale == "scenes":
        features = None if request.fast or kinetics.installed() is None else load_features(None)
        bench = world_bench(request.workdir, runs, World(**experiments.SCENES), conditions, 16, features)
    elif request.real:
        loading = {"batch_norm_eps": request.batch_norm_eps, "allow_torchscript": request.allow_torchscript}
        size = (request.height, request.width)
        bench = svd_bench(runs, request.real, request.i3d, size, request.batch_size, loading)
    else:
        raise ReproduceError("--scale svd needs --real (only --dry_run does without it)")
    return replace(bench, decoder=request.decoder, about_decoder=about)


def _run_share(request: Request, bench: Bench, methods: list[tuple[str, int]]) -> None:
    """Makes the rows of every nth run from run k on, where `request.share` is (k, n)."""
    assert request.share
    (first, of), runs = request.share, bench.runs
    if first and runs.trains_base and not runs.done(BASE, 0):
        raise ReproduceError(f"--share={first}/{of}: {runs.base} is not trained yet; --share=0/{of} does it first")
    runs.ensure(BASE, 0)
    rows_of_base = [(BASE, seed) for seed in request.seeds]
    for name, seed in (methods + rows_of_base)[first::of]:
        ensure_run(bench, name, request.only, seed)


def ensure_run(bench: Bench, run: str, tables: Sequence[str], seed: int) -> dict[str, tuple[dict, np.ndarray]]:
    """Trains a run and makes its rows, as far as they are missing; returns (record, clips) by row key."""
    bench.runs.ensure(run, seed)
    rows = {row.key: row for name in tables for row in bench.rows(name) if row.run == run}
    load = cache(lambda: Sampler.load(bench.runs.workdir(run, seed), **bench.load))
    return {key: ensure_row(bench, row, seed, load) for key, row in rows.items()}


def cores() -> list[int]:
    """Returns the CPU cores that this process may use; empty if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def side_by_side(arguments: Sequence[str], folder: Path, jobs: int) -> None:
    """Runs the command in `jobs` processes, each with its share of the runs and of the cores, and waits for all.

    Args:
      arguments: the command line, to which `--share` is added.
      folder: folder of the logs `job0.log`, `job1.log`, ...
      jobs: number of processes.

    Raises:
      TrainingStopped: if a process fails; the message contains the last line of its log.
    """
    mine, running = cores(), []
    for n in range(jobs):
        command = [sys.executable, "-m", "sfv_jax.reproduce", *arguments, f"--share={n}/{jobs}"]
        with (folder / f"job{n}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
            CHILDREN.append(running[-1])
        if mine[n::jobs]:
            os.sched_setaffinity(running[-1].pid, mine[n::jobs])
    try:
        failed = [n for n, process in enumerate(running) if process.wait()]
    finally:
        for process in running:
            process.terminate()
        for process in running:  # they save what they have
            process.wait()
    if failed:
        log = folder / f"job{failed[0]}.log"
        raise TrainingStopped(f"{log}: {log.read_text().strip().splitlines()[-1:]}; the same command continues")


def reproduce(bench: Bench, tables: Sequence[str], seeds: Sequence[int]) -> Report:
    """Makes all missing runs and rows, writes the report to the folder of the runs, and returns it."""
    records: dict[str, list[dict]] = {}
    clips: dict[str, np.ndarray] = {}
    for seed in seeds:
        for run in [BASE, *experiments.runs_of(tables)]:
            for key, (record, made) in ensure_run(bench, run, tables, seed).items():
                records.setdefault(key, []).append(record)
                clips.setdefault(key, made[:SHOWN])
    report = make_report(bench, tables, seeds, records, clips)
    report.write(bench.runs.folder)
    return report


def default_jobs(scale: str) -> int:
    """Returns the default number of processes.

    Small networks use two cores badly, so on CPU each core has a process, up to four. Otherwise one process uses the
    whole machine.
    """
    return min(4, len(cores()) or os.cpu_count() or 1) if scale != "svd" and jax.default_backend() == "cpu" else 1

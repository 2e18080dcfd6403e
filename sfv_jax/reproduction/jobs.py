"""What is left to train and to score, one run after another or several side by side."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np

from sfv_jax.evaluation.report import Report
from sfv_jax.reproduction import experiments
from sfv_jax.reproduction.experiments import BASE, TABLES
from sfv_jax.reproduction.rows import SHOWN, Bench, ensure_row
from sfv_jax.reproduction.tables import make_report
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.training.alarms import TrainingStopped


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

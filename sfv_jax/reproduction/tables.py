"""The paper's tables with published and measured numbers, and their report."""

from collections.abc import Sequence

import numpy as np

from sfv_jax.evaluation.report import Report
from sfv_jax.reproduction import experiments
from sfv_jax.reproduction.experiments import BASE, TABLES, Row
from sfv_jax.reproduction.rows import SHOWN, Bench, ensure_reference
from sfv_jax.reproduction.strips import picture
from sfv_jax.training.metrics import read_metrics


def summarise(records: list[dict]) -> dict:
    """Combines the records of a row over seeds.

    Returns:
      For one seed its record. For several the means of all numbers, and as `interval` the lowest and highest FVD.
    """
    if len(records) == 1:
        return records[0]
    names = [k for k, v in records[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    values = [record["fvd"] for record in records]
    return {k: float(np.mean([r[k] for r in records])) for k in names} | {"interval": (min(values), max(values))}


def cells(bench: Bench, row: Row, record: dict) -> list:
    """Returns the cells of a table's row."""
    low, high = record["interval"]
    shown = [record[name] for name in bench.columns.values()]
    interval = f"{low:.1f} to {high:.1f}"
    published, seconds = (None if x is None else f"{x:g}" for x in (row.published, row.seconds))  # as printed
    times = [*map(record.get, ("ms_call", "ms_decode", "ms_whole")), seconds]  # references have none
    return [row.label, published, record["fvd"], len(bench.images), interval, *shown, *times]


def orders(rows: list[Row], found: list[dict]) -> list[str]:
    """Returns lines with the published and the measured order of the rows, best first."""
    pairs = [(row.label, row.published, record["fvd"]) for row, record in zip(rows, found, strict=True)]
    both = [(label, fvd, measured) for label, fvd, measured in pairs if fvd is not None]
    if len(both) < 2:
        return []
    published = [label for label, *_ in sorted(both, key=lambda row: row[1])]
    measured = [label for label, *_ in sorted(both, key=lambda row: row[2])]
    same = "the same order" if published == measured else "the order differs"
    return [f"Best first, published: {' < '.join(published)}.", f"Measured: {' < '.join(measured)}: {same}."]


def curves(bench: Bench, runs: list[str], seed: int) -> dict[str, dict[str, list[float]]]:
    """Returns `{loss: {run: values over log intervals}}` from the metrics of the runs of one seed."""
    plots: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        file = bench.runs.workdir(run, seed) / "metrics.jsonl"
        lines = read_metrics(file)[0]
        for name in ("loss/denoising", "loss/consistency", "loss/adversarial", "loss/reconstruction", "loss/hinge"):
            if values := [line[name] for line in lines if line.get(name) is not None]:
                plots.setdefault(name.removeprefix("loss/"), {})[run] = values
    return plots


def make_report(
    bench: Bench,
    tables: Sequence[str],
    seeds: Sequence[int],
    records: dict[str, list[dict]],
    clips: dict[str, np.ndarray],
) -> Report:
    """Returns the report, and writes `strips.png` to the folder of the results.

    Args:
      bench: models, conditions and scores.
      tables: keys of `TABLES`.
      seeds: seeds of the methods.
      records: `{row key: records of all seeds}`.
      clips: `{row key: clips of the first seed}`, uint8 `[n, t, h, w, 3]`.
    """
    report = Report("Tables of SF-V, reproduced")
    several = f"means of seeds {', '.join(map(str, seeds))}; interval: lowest and highest seed"
    notes = [*bench.notes, "N: conditions, held out."]
    notes.append(f"Interval: {several}." if len(seeds) > 1 else f"Seed {seeds[0]}; interval: bootstrap, 95 %.")
    notes.append(
        "ms: one video on this machine, warm: per UNet call (two networks where guided), latents to frames, and image "
        "to frames."
    )
    times = ["ms per call", "ms decoding", "ms in all", "A100 s"]
    columns = ["", "published FVD", "FVD", "N", "interval", *bench.columns, *times]
    for name in tables:
        title, rows = TABLES[name][0], bench.rows(name)
        found = [summarise(records[row.key]) for row in rows]
        lines = [cells(bench, row, record) for row, record in zip(rows, found, strict=True)]
        lines += [cells(bench, Row(label, ""), ensure_reference(bench, label)) for label in bench.references]
        report.table(title, columns, lines, orders(rows, found) + (notes if name == tables[-1] else []))
    if bench.skipped:
        report.text(f"{len(bench.skipped)} real clips could not be read and are in no row", bench.skipped)
    keys = {row.label: row.key for name in tables for row in bench.rows(name)}
    names = [label for label, key in keys.items() if key in clips]
    shown = {"truth": bench.truth} | {label: clips[keys[label]] for label in names}
    grid = {f"condition {n}": {label: x[n] for label, x in shown.items()} for n in range(min(SHOWN, len(bench.images)))}
    report.clips("Side by side", grid, fps=4)
    runs = [BASE, *experiments.runs_of(tables)]
    for loss, series in curves(bench, runs, seeds[0]).items():
        report.lines(f"Training: {loss}", series, "log interval", loss)
    report.record = {"tables": tables, "seeds": seeds, "rows": records, "skipped": bench.skipped}
    picture(shown, bench.runs.folder / "strips.png")
    return report

"""Rows of the tables: sampling, scoring and timing of a trained model."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfv_jax.checkpoints import box
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.checkpoints.run import read_config
from sfv_jax.choices import MOST_SEED
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import fvd, world
from sfv_jax.evaluation.clips import Reading, find_clips
from sfv_jax.evaluation.features import Extractor, compute
from sfv_jax.evaluation.frechet import MIN_SAMPLES, measure
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.reproduction.experiments import Row, rows_of
from sfv_jax.reproduction.runs import ReproduceError, Runs
from sfv_jax.runtime.files import FileError, read_arrays, read_json, replacing, write_json
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampling.sampler import Sampler

SHOWN = 4  # conditions in strips and on the page


@dataclass(frozen=True)
class Bench:
    """Models, conditions, real clips and scores of the tables.

    Attributes:
      runs: the models and the folder of the results.
      truth: real clips uint8 `[n, t, h, w, 3]` at the size of scoring; their first frames are the conditions.
      images: the conditions at full size, uint8 `[h, w, 3]` each.
      resize: function that resizes a generated clip to the size of scoring.
      score: function from clips like `truth` to a dict with `fvd`, `interval` and the scores of `columns`.
      columns: `{title: name of the score}` of further columns.
      notes: lines below the tables.
      options: arguments of every call of the sampler.
      load: arguments of `Sampler.load`.
      batch: videos sampled per call.
      skipped: a line for each real clip that could not be read.
      decoder: tiny decoder of further rows, as for `Sampler.load`; "full" for none.
      about_decoder: its description for records.
      references: `{label: clips like truth}` of further rows that no model made.
    """

    runs: Runs
    truth: np.ndarray
    images: list[np.ndarray]
    resize: Callable[[np.ndarray], np.ndarray]
    score: Callable[[np.ndarray], dict]
    columns: dict[str, str]
    notes: list[str]
    options: dict[str, Any]
    load: dict[str, Any]
    batch: int
    skipped: list[str] = field(default_factory=list)
    decoder: str = "full"
    about_decoder: dict[str, Any] = field(default_factory=dict)
    references: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, table: str) -> list[Row]:
        """Returns the rows of a table, a key of `TABLES`."""
        return rows_of(table, self.decoder)


def world_bench(
    workdir: Path, runs: Runs, rules: World, conditions: int, batch: int = 64, extractor: Extractor | None = None
) -> Bench:
    """Returns the bench of a procedural world; the network of its scores is cached in `workdir`/worldnet.

    Args:
      workdir: folder of the cache.
      runs: the models.
      rules: the world.
      conditions: number of held-out first frames that are sampled and scored.
      batch: videos sampled per call.
      extractor: features for a further column, the Frechet distance of all clips to the true ones.
    """
    truth, labels = rules.batch(range(conditions), "heldout")
    known = functools.cache(lambda features: compute(features, truth))

    def score(clips):
        found = world.score(rules, labels, clips, network=workdir / "worldnet")
        found |= {"fvd": found["world_fvd"], "interval": found["world_fvd_interval"]}
        if extractor:
            found["i3d_fvd"] = measure(known(extractor.features), compute(extractor.features, clips)).value
        return found

    columns = {"distance": "distance", "fit": "fit", "intact": "intact", "body error": "body_error", "legal": "legal"}
    columns |= {"busiest": "busiest_direction"}
    notes = [f"{title}: {world.MEANINGS[name]}." for title, name in columns.items()]
    notes.append(f"FVD: {world.MEANINGS['world_fvd']}.")
    if extractor:
        columns["I3D FVD"] = "i3d_fvd"
        notes.append(f"I3D FVD: to the true clips, by {extractor.about['file']}; true clips are at distance 0.")
    options = dict(noise_aug_strength=0.0)
    images, same = list(truth[:, 0]), lambda clip: clip
    still = {"truth": truth, "still image": np.repeat(truth[:, :1], truth.shape[1], axis=1)}
    return Bench(runs, truth, images, same, score, columns, notes, options, {}, batch, references=still)


def svd_bench(
    runs: Runs,
    real: str,
    i3d: str | None,
    size: tuple[int, int] = (576, 1024),
    batch: int = 8,
    loading: dict[str, Any] | None = None,
) -> Bench:
    """Returns the bench of SVD on real videos, with the protocol of `evaluate` (evaluation/protocol.py).

    Args:
      runs: the models.
      real: folder of the real videos, all of which are used.
      i3d: file of I3D weights, as for `fvd.load_i3d`.
      size: (height, width) of the generated videos in pixels.
      batch: videos sampled per call.
      loading: options of `fvd.load_i3d`.

    Raises:
      ReproduceError: if too few clips can be read.
      WeightsError: if no I3D weights can be used.
    """
    clips = find_clips(real)
    least = f"FVD needs {MIN_SAMPLES} or more"
    if len(clips) < MIN_SAMPLES:
        raise ReproduceError(f"--real={real}: {len(clips)} clips, {least}")
    features, about = fvd.load_i3d(i3d, **(loading or {}))
    frames = read_model(runs.base).config("unet").num_frames
    protocol = Protocol(n=0, num_frames=frames, height=size[0], width=size[1])
    reading = Reading(frames, protocol.fps, protocol.real)
    images, truth = [], []
    for clip, shrunk in reading.frames(clips):
        images.append(protocol.cut(clip.read(num_frames=1)[0]))
        truth.append(shrunk)
    for line in reading.unreadable:
        print(f"skipped {line}", flush=True)
    found = f"--real={real}: {len(truth)} clips of {frames} frames, {len(reading.unreadable)} skipped"
    if len(truth) < MIN_SAMPLES:
        raise ReproduceError(f"{found}; {least}")
    print(found, flush=True)
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
        ],
        options=dict(height=protocol.height, width=protocol.width),
        load=dict(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16", mesh=mesh),  # CPUs emulate it
        batch=batch,
        skipped=reading.unreadable,
    )


def ensure_row(bench: Bench, row: Row, seed: int, load: Callable[[], Sampler]) -> tuple[dict, np.ndarray]:
    """Returns (record, clips) of a row: from its files if they are up to date, else made with the sampler of `load`."""
    folder = bench.runs.folder / f"seed{seed}" / "rows" / row.key
    path = bench.runs.workdir(row.run, seed)
    trained = read_config(path) if (path / "config.json").is_file() else box.NAMES.get(str(path))
    origin = [str(path), trained, row.run, row.steps, row.sampler, row.guidance, seed, bench.options]
    origin += [] if row.decoder == "full" else [bench.about_decoder]
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode() + bench.truth.tobytes()).hexdigest()
    kept = folder / "row.json"
    with contextlib.suppress(FileError):  # missing or damaged: made anew
        if record := _kept_record(bench, kept, digest):
            return record, read_clips(folder, bench, digest)
    sampler = load() if row.decoder == "full" else load().with_decoder(row.decoder)
    clips = sample_clips(bench, sampler, row, seed, folder, digest)
    record = {"digest": digest} | bench.score(clips) | latency(bench, sampler, row)
    record |= {} if row.decoder == "full" else {"decoder": bench.about_decoder}
    write_json(kept, record)
    return record, clips


def ensure_reference(bench: Bench, label: str) -> dict:
    """Returns the record of a row of `bench.references`, from its file if it is up to date."""
    clips, kept = bench.references[label], bench.runs.folder / "references" / f"{label.replace(' ', '_')}.json"
    digest = hashlib.sha256(clips.tobytes() + bench.truth.tobytes()).hexdigest()
    with contextlib.suppress(FileError):
        if record := _kept_record(bench, kept, digest):
            return record
    record = {"digest": digest} | bench.score(clips)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, record)
    return record


def _kept_record(bench: Bench, file: Path, digest: str) -> dict | None:
    """Reads a row's record; returns None if it is of other clips or lacks a score, which may be younger.

    Raises:
      FileError: if the file is missing or damaged.
    """
    record = read_json(file, "", ("digest",))
    return record if record["digest"] == digest and not set(bench.columns.values()) - set(record) else None


def how(row: Row) -> dict[str, Any]:
    """Returns the sampler's arguments for a row."""
    return dict(steps=row.steps, sampler=row.sampler, guidance=row.guidance)


def sample_clips(bench: Bench, sampler: Sampler, row: Row, seed: int, folder: Path, digest: str) -> np.ndarray:
    """Samples a clip for each condition and stores each batch in a file; returns the clips, like `Bench.truth`.

    Files with the same `digest` are reused. Video n has seed 1000000 `seed` + n, modulo 2^32, in every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(bench.images), bench.batch):
        file = folder / f"{first:06d}.npz"
        images = bench.images[first : first + bench.batch]
        with contextlib.suppress(FileError):
            _read_batch(file, len(images), digest)
            continue
        seeds = [(1_000_000 * seed + first + n) % (MOST_SEED + 1) for n in range(len(images))]
        clips = np.stack([bench.resize(x) for x in sampler(images, seed=seeds, **how(row), **bench.options)])
        with replacing(file) as temporary, temporary.open("wb") as out:
            np.savez_compressed(out, clips=clips, digest=digest)
    return read_clips(folder, bench, digest)


def read_clips(folder: Path, bench: Bench, digest: str) -> np.ndarray:
    """Reads the clips that `sample_clips` stored.

    Raises:
      FileError: if a file is missing, damaged or has another digest.
    """
    firsts = range(0, len(bench.images), bench.batch)
    counts = [len(bench.images[first : first + bench.batch]) for first in firsts]
    return np.concatenate(
        [_read_batch(folder / f"{first:06d}.npz", count, digest) for first, count in zip(firsts, counts, strict=True)]
    )


def _read_batch(file: Path, count: int, digest: str) -> np.ndarray:
    arrays = read_arrays(file, "it is made again", ("clips", "digest"))
    if str(arrays["digest"]) != digest or arrays["clips"].shape[:1] != (count,):
        raise FileError(f"{file} contains other clips")
    return arrays["clips"]


def latency(bench: Bench, sampler: Sampler, row: Row, repeats: int = 5) -> dict:
    """Returns the milliseconds of one video per UNet call, of decoding it, and from image to frames.

    Each is the best of `repeats` calls. A call that compiles goes before.
    """
    calls, decodes, wholes = [], [], []
    for _ in range(repeats + 1):
        times, began = {}, time.perf_counter()
        sampler(bench.images[:1], times=times, **how(row), **bench.options)
        wholes.append(time.perf_counter() - began)
        calls.append(times["denoise"] / row.steps)
        decodes.append(times["decode"])
    found = {"ms_call": calls, "ms_decode": decodes, "ms_whole": wholes}
    return {name: 1000 * min(seconds[1:]) for name, seconds in found.items()}

"""Kinds of score: a folder alone, a folder against a folder, a model on real videos, a model on its world."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.data.video import VideoError
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import no_reference
from sfv_jax.evaluation import world as exact
from sfv_jax.evaluation.clips import FILES, Clip, Dataset, Reading, condition_images, find_clips
from sfv_jax.evaluation.features import (
    Extractor,
    Set,
    check_count,
    compute_kept,
    compute_kept_clips,
    features_of,
    label,
)
from sfv_jax.evaluation.frames import SIMILARITY, Similarity, Tower, add_curves, measure_cmmd, per_frame, similarity
from sfv_jax.evaluation.frames import notes as frame_notes
from sfv_jax.evaluation.frechet import Distance, measure
from sfv_jax.evaluation.generation import Model, generate, read_strip
from sfv_jax.evaluation.mmd import MEANING, Estimate, measure_mmd, measure_pairs, pair_distances
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import DOWN, Cell, Report, interval


@dataclass(frozen=True)
class Extras:
    """Optional parts of a report.

    Attributes:
      tower: SVD's CLIP tower, for CMMD and similarity; None omits them.
      flow: compute optical flow.
      shown: number of names whose clips the page plays.
    """

    tower: Tower | None = None
    flow: bool = True
    shown: int = 9


def folder_alone(videos: Path, reading: Reading, images: Path | None, extras: Extras) -> Report:
    """Scores each clip under `videos` alone.

    Args:
      videos: folder of clips; subfolders are groups.
      reading: the reader of the clips.
      images: folder of condition images; None: first frames take their place.
      extras: optional parts of the report.
    Raises:
      VideoError: if no clip can be read, or a condition is missing.
    """
    clips = find_clips(videos)
    names = sorted({clip.name for clip in clips})
    found = condition_images(images, set(names)) if images else None
    results = no_reference.score_clips(
        reading.frames(clips),
        images=None if found is None else found.__getitem__,
        similarity=(lambda clip, *pictures: extras.tower.similarity(*pictures)) if extras.tower else None,
        flow=extras.flow,
        shown=names[: extras.shown],
        total=len(clips),
    )
    if not results.rows:
        reasons = "".join(f"\n  {line}" for line in reading.unreadable[:10])
        raise VideoError(f"none of the {len(clips)} clips in {videos} can be read:{reasons}")
    report = Report(f"Scores of {videos.name}")
    source = f"images of the same names in {images.name}" if images else "the first frame of each clip"
    no_reference.add_to(report, results, reading, source)
    report.missing = reading.unreadable
    return report


def folder_against_folder(
    videos: Path,
    reference: Path,
    protocol: Protocol,
    extractor: Extractor,
    *,
    kept: Path | None = None,
    tower: Tower | None = None,
    shown: int = 9,
) -> Report:
    """Measures the Frechet distance of each group under `videos` to all clips under `reference`.

    All sets are cut to one size: `protocol.n`, or that of the smallest set if `protocol.n` is 0.

    Args:
      videos: folder of clips; subfolders are groups.
      reference: folder of real clips.
      protocol: selection, length, rate and sizes of the clips.
      extractor: the feature extractor.
      kept: file that stores the features of the real clips; see `features_of`.
      tower: SVD's CLIP tower, for CMMD and similarity; None omits them.
      shown: number of names whose clips the page plays.
    Raises:
      VideoError: if a set has fewer usable clips than `protocol.n`, or than 20.
    """
    clips = find_clips(videos)
    groups = sorted({clip.group for clip in clips})
    references = Dataset(find_clips(reference), str(reference))
    members = {group: [clip for clip in clips if clip.group == group] for group in groups}
    datasets = {group: Dataset(some, str(videos / group)) for group, some in members.items()}
    for dataset in (references, *datasets.values()):
        check_count(dataset, protocol)

    def found(extractor: Extractor, kept: Path | None) -> Features:
        real = features_of(references, protocol, extractor, kept=kept)
        sets = {
            # Generated clips are not cropped: they have the right aspect ratio already.
            group or "all": features_of(dataset, protocol, extractor, prepare=protocol.score)
            for group, dataset in datasets.items()
        }
        return Features(real, sets, extractor.about)

    features = found(extractor, kept)
    frames = found(tower.extractor, _beside(kept)) if tower else None
    n = min(len(some.names) for some in features.all().values())
    report = Report(f"{videos.name} against {reference.name}")
    report.missing = [line for some in features.sets.values() for line in some.dropped]
    add_distances(report, features, replace(protocol, n=n), frames=frames)
    wanted = sorted({clip.name for clip in clips})[:shown]
    add_clips(report, [clip for clip in clips if clip.name in wanted], protocol)
    return report


def add_clips(report: Report, clips: list[Clip], protocol: Protocol) -> None:
    """Adds `clips` to the page at the score size, one row for each name and one column for each group."""
    pictures: dict[str, dict[str, np.ndarray]] = {clip.name: {} for clip in clips}
    for clip, frames in Reading(protocol.num_frames, protocol.fps, protocol.score).frames(clips):
        pictures[clip.name].setdefault(clip.group or "all", frames)
    if clips:
        report.clips("Some of the clips, as scored", pictures, protocol.fps)


def checkpoint_on_videos(
    model: Model,
    dataset: Dataset,
    out: Path,
    protocol: Protocol,
    extractor: Extractor,
    *,
    kept: Path | None = None,
    extras: Extras,
) -> Report:
    """Generates from the first frames of real clips and measures the Frechet distance to those clips.

    Args:
      model: the model to score.
      dataset: the real clips.
      out: folder for the results; generated clips and their features are stored in `out / "generated"`.
      protocol: selection, length, rate and sizes of the clips.
      extractor: the feature extractor.
      kept: file that stores the features of the real clips; see `features_of`.
      extras: optional parts of the report.
    Raises:
      VideoError: if there are fewer usable real clips than `protocol.n`, or `out` contains clips made in another way.
    """
    real = features_of(dataset, protocol, extractor, kept=kept)
    protocol = replace(protocol, n=len(real.names))
    by_name = {label(clip): clip for clip in dataset.clips}

    def first(n: int) -> np.ndarray:
        return by_name[real.names[n]].read(num_frames=1)[0]

    folder = out / "generated"
    files = generate(model.on(dataset=dataset.name, source=dataset.source), real.names, first, folder, protocol)
    read = lambda file: read_strip(file, protocol.num_frames)  # noqa: E731

    def against(real: Set, extractor: Extractor, file: str) -> Features:
        fake = Set(compute_kept(extractor, files, read, folder / file), real.names, [])
        return Features(real, {"generated": fake}, extractor.about)

    features, frames = against(real, extractor, "features.npz"), None
    if extras.tower:
        embedded = features_of(dataset, protocol, extras.tower.extractor, kept=_beside(kept))
        frames = against(embedded, extras.tower.extractor, "frames.npz")
    report = Report(f"{model.origin['checkpoint']} on {dataset.name}")
    add_distances(report, features, protocol, dataset.source, paired=True, frames=frames)
    curves = _to_first_frames(frames, protocol) if frames else {}
    order = sorted(range(len(files)), key=lambda k: real.names[k])
    place = {real.names[k]: k for k in order}
    shown = [real.names[k] for k in order[: extras.shown]]

    def generated() -> Iterator[tuple[Clip, np.ndarray]]:
        for k in order:
            yield Clip(files[k], "generated", real.names[k], None), read_strip(files[k], protocol.num_frames)

    results = no_reference.score_clips(
        generated(),
        images=lambda name: protocol.real(first(place[name])),
        similarity=(lambda clip, *_: curves[clip.name]) if curves else None,
        flow=extras.flow,
        shown=shown,
        total=len(files),
    )
    for name in shown:
        frames = by_name[name].read(protocol.num_frames, protocol.fps, protocol.real)
        images = {no_reference.CONDITION: results.shown[name].pop(no_reference.CONDITION)}
        results.shown[name] = images | {"real": frames} | results.shown[name]
    no_reference.add_to(report, results, Reading(protocol.num_frames, protocol.fps), "the first frame of the real clip")
    report.record |= {"dataset": dataset.name, "source": dataset.source}
    report.record |= {"options": asdict(model.options), "origin": model.origin}
    return report


@dataclass(frozen=True)
class Features:
    """Features of the real clips and of sets of clips by name, and the description of their extractor."""

    real: Set
    sets: dict[str, Set]
    about: dict[str, Any]

    def all(self) -> dict[str, Set]:
        """Returns all sets; the real clips are "reference"."""
        return {"reference": self.real, **self.sets}


def _beside(kept: Path | None) -> Path | None:
    """Returns the file for the real clips' CLIP embeddings: `real.clip.npz` for `real.npz`."""
    return kept and kept.with_suffix(f".clip{kept.suffix}")


def _to_first_frames(frames: Features, protocol: Protocol) -> dict[str, np.ndarray]:
    """Returns the similarities `[t]` of generated clips to the first frames of the real ones, their conditions."""
    real, fake = (per_frame(x.features, protocol.num_frames) for x in (frames.real, frames.sets["generated"]))
    return dict(zip(frames.real.names, similarity(fake, real[:, 0]), strict=True))


def add_distances(
    report: Report,
    features: Features,
    protocol: Protocol,
    source: dict[str, Any] = FILES,
    *,
    paired: bool = False,
    frames: Features | None = None,
) -> None:
    """Measures sets against the real clips at n = `protocol.n` and adds the distances and their settings to `report`.

    Args:
      report: the report to extend.
      features: features of the clips.
      protocol: the protocol of the features.
      source: JSON description of the files of the real clips.
      paired: the kth clips of all sets have the same condition.
      frames: CLIP embeddings of the same clips; None omits CMMD and similarity.
    """
    sets = features.all()
    found = {name: compare(features.real, some, protocol, paired) for name, some in features.sets.items()}
    if frames:
        for name, some in frames.sets.items():
            found[name] |= compare_frames(frames.real, some, protocol, paired)
    kind = "Frechet distance" if features.about["kind"] == "function" else "FVD"
    columns = {
        "distances": [f"{kind} {DOWN}", f"N to infinity {DOWN}", "95 % interval"],
        "mmd": [f"MMD {DOWN}", "95 % interval"],
        "pairs": [f"distance of pairs {DOWN}", "95 % interval"],
        "cmmd": [f"CMMD {DOWN}", "95 % interval"],
        "similarity": SIMILARITY,
    }
    kinds = [key for key in columns if any(key in some for some in found.values())]
    head = ["", *(title for key in kinds for title in columns[key]), "N"]
    rows = [[name, *(cell for key in kinds for cell in _cells(x.get(key))), protocol.n] for name, x in found.items()]
    notes = footer(protocol, features, source)
    if frames:
        notes += frame_notes(
            frames.about, "first frame of the real clip" if paired else "first frame of the clip itself"
        )
    report.table("Distance to the reference", head, rows, notes)
    curves = {name: part for name, x in found.items() for part in x.values() if isinstance(part, Similarity)}
    if curves:
        add_curves(report, curves)
    dropped = {name: some.dropped for name, some in sets.items() if some.dropped}
    for name, lines in dropped.items():
        report.text(f"{name}: {len(lines)} clips were dropped", lines)
    report.record |= {
        "protocol": asdict(protocol),
        "features": features.about,
        **({"frames": frames.about} if frames else {}),
        **{key: {name: asdict(x[key]) for name, x in found.items() if key in x} for key in kinds},
        "clips_used": {name: some.names[: protocol.n] for name, some in sets.items()},
        "dropped": dropped,
    }


def compare(real: Set, some: Set, protocol: Protocol, paired: bool) -> dict[str, Distance | Estimate | Similarity]:
    """Measures the first `protocol.n` clips of `some` against those of `real`.

    Returns:
      `distances`, the Frechet distance, and `mmd`; also `pairs`, the mean distance of the kth clips of both sets, if
      they are `paired`.
    """
    n, seed = protocol.n, protocol.seed
    x, y = real.features[:n], some.features[:n]
    found: dict[str, Distance | Estimate | Similarity] = {
        "distances": measure(x, y, ddof=protocol.ddof, seed=seed),
        "mmd": measure_mmd(x, y, paired=paired, seed=seed),
    }
    return found | ({"pairs": measure_pairs(pair_distances(x, y), seed=seed)} if paired else {})


def compare_frames(real: Set, some: Set, protocol: Protocol, paired: bool) -> dict[str, Estimate | Similarity]:
    """Measures `cmmd` of the first `protocol.n` clips; also `similarity` to their own first frames if not `paired`.

    (Paired clips have conditions, and are scored against them clip by clip.)
    """
    x, y = (per_frame(each.features[: protocol.n], protocol.num_frames) for each in (real, some))
    found: dict[str, Estimate | Similarity] = {"cmmd": measure_cmmd(x, y, paired=paired, seed=protocol.seed)}
    return found if paired else found | {"similarity": Similarity.of(similarity(y, y[:, 0]))}


def _cells(x: Distance | Estimate | Similarity | None) -> list[Cell]:
    """Returns the cells of a distance in a table."""
    if x is None:
        return [None, None]
    if isinstance(x, Similarity):
        return [*x.cells]
    value = [x.value, x.extrapolated] if isinstance(x, Distance) else [x.value]
    return [*value, interval(x.interval)]


def footer(protocol: Protocol, features: Features, source: dict) -> list[str]:
    """Describes the settings of a distance in sentences: protocol, real clips, features, usable and dropped clips."""
    fields, made, read = (
        ", ".join(f"{k} {v}" for k, v in x.items()) for x in (asdict(protocol), features.about, source)
    )
    counts = (f"{name} {len(x.names)} (and {len(x.dropped)} dropped)" for name, x in features.all().items())
    notes = [
        f"Protocol: {fields}.",
        f"Real clips: {read}.",
        f"Features: {made}.",
        f"Usable clips: {', '.join(counts)}; {protocol.n} of each used.",
        "Distances are comparable at equal N and equal features only. The interval is a bootstrap over clips.",
        MEANING,
    ]
    width = features.real.features.shape[1]
    if protocol.n < width:
        few = f"{protocol.n} clips are fewer than {width} features"
        notes.append(f"{few}: most of the distance is bias, and N to infinity a guess.")
    return notes


def checkpoint_on_world(
    model: Model,
    world: World,
    out: Path,
    *,
    n: int,
    seed: int = 0,
    network: exact.Network | Path | None = None,
    extractor: Extractor | None = None,
    shown: int = 9,
) -> Report:
    """Generates from held-out first frames of the world and scores the clips exactly; see `evaluation.world`.

    The same scores are computed of other true continuations of these first frames ("truth") and of still images.

    Args:
      model: the model to score.
      world: the procedural world.
      out: folder for the results; generated clips are stored in `out / "generated"`, features of all sets in
        `out / "features.npz"`.
      n: number of first frames.
      seed: seed of the first clip, of the continuations and of the bootstrap.
      network: as for `world.score`.
      extractor: extractor of the features on which all sets are compared with held-out clips; None omits distances.
      shown: number of clips that the page plays.
    """
    real, labels = world.batch(range(n), "heldout")
    protocol = Protocol(
        n=n,
        seed=seed,
        num_frames=world.num_frames,
        height=world.size,
        width=world.size,
        score_height=world.size,
        score_width=world.size,
    )
    names = [f"{k:05d}" for k in range(n)]
    files = generate(model.on(world=asdict(world)), names, lambda k: real[k, 0], out / "generated", protocol)
    clips = np.stack([read_strip(file, world.num_frames) for file in files])
    still = np.repeat(real[:, :1], world.num_frames, axis=1)
    sets = {"generated": clips, "truth": exact.redrawn(world, labels, seed), "still image": still}
    found = {name: exact.score(world, labels, x, network=network, seed=seed) for name, x in sets.items()}
    report = Report(f"{model.origin['checkpoint']} on its world")
    _add_exact(report, found, [f"{n} held-out first frames, seeds from {seed}."])
    if extractor:
        known = compute_kept_clips(extractor, np.concatenate([real, *sets.values()]), out / "features.npz")
        first, *others = (Set(x, names, []) for x in np.split(known, 1 + len(sets)))
        features = Features(first, dict(zip(sets, others, strict=True)), extractor.about)
        add_distances(report, features, protocol, {"kind": "held-out clips of the world"}, paired=True)
    report.clips("Side by side", {names[k]: {g: x[k] for g, x in sets.items()} for k in range(min(shown, n))}, 4)
    report.record |= {"scores": found, "options": asdict(model.options), "origin": model.origin}
    report.record |= {"protocol": asdict(protocol)}
    return report


def _add_exact(report: Report, found: dict[str, dict], notes: list[str]) -> None:
    """Adds the table of the exact scores `{set: result of world.score}`; scores that no set has are left out."""
    scores = [name for name in exact.MEANINGS if any(x[name] is not None for x in found.values())]
    rows = [[name, *(x[key] for key in scores)] for name, x in found.items()]
    columns = ["", *(name.replace("_", " ") for name in scores)]
    notes = [*notes, *(f"{name.replace('_', ' ')}: {exact.MEANINGS[name]}." for name in scores)]
    if "world_fvd" in scores:
        columns.append("95 % interval")
        for row, x in zip(rows, found.values(), strict=True):
            row.append(interval(x["world_fvd_interval"]))
        about = next(iter(found.values()))["network"]
        accuracy = ", ".join(f"{k} {v:.3f}" for k, v in about["accuracy"].items())
        notes.append(f"Network of world fvd: accuracy {accuracy}; SHA-256 {about['sha256']}.")
    report.table("Exact scores", columns, rows, notes)

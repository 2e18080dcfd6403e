"""Two sets of samples on the same conditions, compared pair by pair: a score for sets too small for FVD."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sfv_jax.data.video import VideoError
from sfv_jax.evaluation.clips import Clip, Reading, find_clips
from sfv_jax.evaluation.features import Extractor, compute
from sfv_jax.evaluation.frames import (
    SIMILARITY,
    Similarity,
    Tower,
    add_curves,
    measure_cmmd,
    notes,
    per_frame,
    similarity,
)
from sfv_jax.evaluation.mmd import MEANING, MIN_PAIRS, Estimate, measure_mmd, measure_pairs, pair_distances
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import DOWN, Report, interval
from sfv_jax.runtime.files import one_line
from sfv_jax.runtime.progress import progress

Pair = tuple[Clip, Clip]  # a clip and its reference
NOTES = [
    MEANING,
    "Several videos of one condition count as their mean in the distance of pairs; the rest counts the first of them.",
    "Numbers are comparable for equal conditions, references and features only.",
]


def match(videos: Path, reference: Path) -> dict[str, list[Pair]]:
    """Pairs the clips of each group under `videos` with the clips of the same name and seed under `reference`.

    A reference without a seed is that of all seeds. A group that is the reference itself is left out.

    Returns:
      `{group: pairs}`, sorted.
    Raises:
      VideoError: if two references have one name, or a group has too few pairs.
    """
    others: dict[tuple, Clip] = {}
    for clip in find_clips(reference):
        other = others.setdefault((clip.name, clip.seed), clip)
        if other is not clip:
            lines = f"{one_line(other.path)} and {one_line(clip.path)} have one name"
            raise VideoError(f"{lines}: give --reference one of the subfolders of {one_line(reference)}")
    groups: dict[str, list[Pair]] = {}
    for clip in find_clips(videos):
        if (videos / clip.group).resolve() == reference.resolve():
            continue
        pairs = groups.setdefault(clip.group, [])
        if found := others.get((clip.name, clip.seed)) or others.get((clip.name, None)):
            pairs.append((clip, found))
    if not groups:
        raise VideoError(f"{one_line(videos)} holds no clips but the references: there is nothing to compare")
    for group, pairs in groups.items():
        _enough(videos / group, pairs, "have a reference of the same name")
    return groups


def _enough(folder: Path, pairs: list[Pair], what: str) -> None:
    """Raises VideoError if the pairs have too few conditions."""
    count = len({clip.name for clip, _ in pairs})
    if count < MIN_PAIRS:
        raise VideoError(
            f"{one_line(folder)}: {count} conditions {what}, fewer than the {MIN_PAIRS} that --paired needs"
        )


def folder_paired(
    videos: Path,
    reference: Path,
    protocol: Protocol,
    extractor: Extractor,
    groups: dict[str, list[Pair]],
    tower: Tower | None = None,
) -> Report:
    """Measures the distance of each group to the references of the same conditions.

    Args:
      videos, reference: the folders.
      protocol: length, rate and sizes of the clips; nothing is cropped.
      extractor: the feature extractor.
      groups: the pairs, from `match`.
      tower: SVD's CLIP tower, for CMMD and similarity; None omits them.
    Raises:
      VideoError: if too few clips can be read.
    """
    reading = Reading(protocol.num_frames, protocol.fps, protocol.score)
    clips = list(dict.fromkeys(clip for pairs in groups.values() for pair in pairs for clip in pair))
    features = _features(clips, reading, extractor)
    again = replace(reading, unreadable=[])
    frames = _features([*features], again, tower.extractor) if tower else {}
    report = Report(f"{videos.name} against {reference.name}, pair by pair", missing=reading.unreadable)
    rows, record, similarities = [], {}, {}
    for group, found in groups.items():
        pairs = [pair for pair in found if all(clip in features for clip in pair)]
        _enough(videos / group, pairs, "can be read")
        means, mean, mmd = _compare(pairs, features, protocol.seed)
        cells = [mean.value, interval(mean.interval), mmd.value, interval(mmd.interval)]
        record[group or "all"] = {"distance": asdict(mean), "mmd": asdict(mmd), "conditions": means}
        if tower:
            cmmd, kept = _compare_frames(pairs, frames, protocol)
            cells += [cmmd.value, interval(cmmd.interval), *kept.cells]
            record[group or "all"] |= {"cmmd": asdict(cmmd), "similarity": asdict(kept)}
            similarities[group or "all"] = kept
        rows.append([group or "all", *cells, mean.n, len(pairs)])
    columns = [f"distance of pairs {DOWN}", "95 % interval", f"MMD {DOWN}", "95 % interval"]
    columns += [f"CMMD {DOWN}", "95 % interval", *SIMILARITY] if tower else []
    made, read = (", ".join(f"{k} {v}" for k, v in x.items()) for x in (extractor.about, protocol.reading()))
    lines = [f"Features: {made}.", f"Protocol: {read}.", *NOTES]
    lines += notes(tower.about, "the first frame of the reference") if tower else []
    report.table("Distance to the references", ["", *columns, "conditions", "pairs"], rows, lines)
    report.record |= {"protocol": asdict(protocol), "features": extractor.about, "paired": record}
    if tower:
        add_curves(report, similarities)
        report.record["frames"] = tower.about
    return report


def _compare(
    pairs: list[Pair], features: dict[Clip, np.ndarray], seed: int
) -> tuple[dict[str, float], Estimate, Estimate]:
    """Returns the distance of each condition, its mean over conditions, and the MMD."""
    by_name = defaultdict(list)
    for clip, other in pairs:
        by_name[clip.name].append((features[clip], features[other]))
    means = {name: float(pair_distances(*map(np.stack, zip(*x, strict=True))).mean()) for name, x in by_name.items()}
    ours, references = (np.stack(x) for x in zip(*(x[0] for x in by_name.values()), strict=True))
    mean = measure_pairs(np.array([*means.values()]), seed=seed)
    return means, mean, measure_mmd(references, ours, paired=True, seed=seed)


def _compare_frames(
    pairs: list[Pair], frames: dict[Clip, np.ndarray], protocol: Protocol
) -> tuple[Estimate, Similarity]:
    """Returns CMMD, and the similarity to the first frames of the references, of the first video of each condition."""
    firsts = {clip.name: (frames[clip], frames[other]) for clip, other in reversed(pairs)}
    ours, references = (per_frame(np.stack(x), protocol.num_frames) for x in zip(*firsts.values(), strict=True))
    return (
        measure_cmmd(references, ours, paired=True, seed=protocol.seed),
        Similarity.of(similarity(ours, references[:, 0])),
    )


def _features(clips: list[Clip], reading: Reading, extractor: Extractor) -> dict[Clip, np.ndarray]:
    """Returns the features of all readable clips."""
    used: list[Clip] = []

    def frames() -> Iterator[np.ndarray]:
        with progress(len(clips), "clips for features") as advance:
            for clip, x in reading.frames(clips):
                used.append(clip)
                advance(1)
                yield x

    return dict(zip(used, compute(extractor.features, frames(), extractor.batch_size), strict=True))


def shown(groups: dict[str, list[Pair]], count: int) -> list[Clip]:
    """Returns the clips of the first `count` conditions, references in a group of their own, for the page."""
    names = sorted({clip.name for pairs in groups.values() for clip, _ in pairs})[:count]
    pairs = [pair for pairs in groups.values() for pair in pairs if pair[0].name in names]
    return list(dict.fromkeys([replace(other, group="reference") for _, other in pairs] + [clip for clip, _ in pairs]))

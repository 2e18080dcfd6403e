"""Clips generated from first frames, stored without loss and reused when the same command runs again."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from sfv_jax.data.images import read_image
from sfv_jax.data.video import VideoError, write_video
from sfv_jax.evaluation.protocol import Protocol, differences, digest
from sfv_jax.runtime.commands import check_seeds
from sfv_jax.runtime.files import write_json
from sfv_jax.runtime.progress import progress
from sfv_jax.weights.folders import read_json


@dataclass(frozen=True)
class Options:
    """Arguments of every call of the sampler; see `Sampler.__call__`."""

    steps: int = 1
    sampler: str = "euler"
    motion_bucket_id: float = 127.0
    noise_aug_strength: float = 0.02
    decode_chunk_size: int | None = None
    guidance: tuple[float, float] | None = None


@dataclass(frozen=True)
class Model:
    """A model to score.

    Attributes:
      sampler: a `Sampler`, or a function with the same arguments.
      origin: JSON description of what else determines its clips, for records: `checkpoint`, step, dtypes, ...
      options: arguments of every call.
      batch_size: clips generated at a time.
    """

    sampler: Callable[..., np.ndarray]
    origin: dict[str, Any]
    options: Options = Options()
    batch_size: int = 1

    def on(self, **data: Any) -> "Model":
        """Returns the model with the description `data` of its conditions added to `origin`."""
        return dataclasses.replace(self, origin=self.origin | data)


def generate(
    model: Model, names: list[str], image: Callable[[int], np.ndarray], folder: Path, protocol: Protocol
) -> list[Path]:
    """Generates the clips that `folder` lacks.

    A clip is a PNG of its frames side by side at the score size: lossless, because compression changes scores.
    `manifest.json` in the folder describes how the clips were made; a folder with another manifest is not touched. A
    later call may add more clips of the same order.

    Args:
      model: the model to generate with.
      names: names of the clips.
      image: function from k to the condition of clip k, uint8 `[h, w, 3]`.
      folder: folder of the clips, created if missing.
      protocol: seed, length, rate and sizes of the clips.
    Returns:
      The files of the clips in the order of `names`.
    Raises:
      VideoError: if `folder` contains clips made in another way.
      UserError: if the seed of the last clip is too large.
    """
    check_seeds(protocol.seed, len(names))
    names = [name.replace("/", "--") for name in names]
    seeds = [protocol.seed + n for n in range(len(names))]
    options, batch_size = dataclasses.asdict(model.options), model.batch_size
    made_by = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("n", "ddof")}
    manifest = {"protocol": made_by, "options": options, "origin": model.origin, "clips": names, "seeds": seeds}
    manifest = json.loads(json.dumps(manifest))  # in the form in which it is read back
    _claim(folder, manifest)
    files = [folder / f"{name}.png" for name in names]
    todo = [n for n, file in enumerate(files) if not file.is_file()]
    shape = {name: getattr(protocol, name) for name in ("num_frames", "height", "width", "fps")}
    with progress(len(files), "generated clips") as advance:
        advance(len(files) - len(todo))
        for first in range(0, len(todo), batch_size):
            rows = todo[first : first + batch_size]
            # Always a full batch: a smaller last one would be compiled again.
            full = rows + rows[-1:] * (batch_size - len(rows))
            images = [protocol.cut(image(n)) for n in full]
            videos = model.sampler(images, seed=[seeds[n] for n in full], **shape, **options)
            for n, frames in zip(rows, videos, strict=False):
                write_video(files[n], protocol.score(frames))
            advance(len(rows))
    return files


def read_strip(path: Path, num_frames: int) -> np.ndarray:
    """Reads the frames uint8 `[t, h, w, 3]` of a clip that `generate` wrote.

    Raises:
      ImageError: if the file cannot be read.
      VideoError: if its width is no multiple of `num_frames`.
    """
    strip = read_image(path)
    if strip.shape[1] % num_frames:
        raise VideoError(f"{path}: {strip.shape[1]} pixels are not {num_frames} frames")
    return rearrange(strip, "h (t w) c -> t h w c", t=num_frames)


def _claim(folder: Path, manifest: dict) -> None:
    """Writes the manifest of `folder`, or checks it against that of an earlier run."""
    path = folder / "manifest.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        remedy = f"use another --out, or remove {folder}"
        earlier = read_json(path, remedy)
        if not all(isinstance(earlier.get(name), list) for name in ("clips", "seeds")):
            raise VideoError(f"{path} cannot be used: it has no lists of clips and seeds; {remedy}")
        # One list may be longer; the common part of clips and seeds must agree.
        common = min(len(earlier["clips"]), len(manifest["clips"]))
        cut = {"clips": slice(common), "seeds": slice(common)}
        before, now = ({k: digest(v[cut[k]]) if k in cut else v for k, v in x.items()} for x in (earlier, manifest))
        changed = differences(before, now)
        if changed:
            what = "; ".join(changed)
            raise VideoError(f"{folder} holds clips made differently: {what}. Use another --out, or remove it")
        if common == len(manifest["clips"]):
            return
    write_json(path, manifest)

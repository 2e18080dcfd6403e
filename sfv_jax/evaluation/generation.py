"""Clips generated from first frames, kept without loss and reused when the same command runs again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange

from sfv_jax.data.video import VideoError, read_image, write_video
from sfv_jax.evaluation.protocol import Protocol, differences, digest
from sfv_jax.runtime.files import write_json
from sfv_jax.runtime.progress import progress
from sfv_jax.weights.folders import read_json


def generate(
    sampler: Callable,
    names: list[str],
    image: Callable[[int], np.ndarray],
    folder: Path,
    protocol: Protocol,
    *,
    options: dict,
    origin: dict,
    batch_size: int = 1,
) -> list[Path]:
    """Makes the clips that are not in `folder` yet; returns their files in the order of `names`.

    A clip is a PNG of its frames side by side, at the score size: lossless, because compression changes scores. Beside
    them `manifest.json` tells how they were made; clips of another manifest are not touched. More clips of the same
    order may follow later.

    Args:
      sampler: a `Sampler`, or anything called like one.
      image: the condition of clip k, uint8 `[h, w, 3]`.
      options: more arguments of the sampler (steps, guidance, ...).
      origin: what else made the clips (checkpoint, step, ...).
    Raises:
      VideoError: if `folder` holds clips made in another way.
    """
    names = [name.replace("/", "--") for name in names]
    made_by = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("n", "ddof")}
    manifest = {"protocol": made_by, "options": options, "origin": origin, "clips": names}
    manifest["seeds"] = [protocol.seed + n for n in range(len(names))]
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    _claim(folder, manifest)
    files = [folder / f"{name}.png" for name in names]
    todo = [n for n, file in enumerate(files) if not file.is_file()]
    shape = {name: getattr(protocol, name) for name in ("num_frames", "height", "width", "fps")}
    with progress(len(files), "generated clips") as advance:
        advance(len(files) - len(todo))
        for first in range(0, len(todo), batch_size):
            rows = todo[first : first + batch_size]
            # A full batch every time, or the last one would be compiled again.
            full = rows + rows[-1:] * (batch_size - len(rows))
            images, seeds = [protocol.cut(image(n)) for n in full], [manifest["seeds"][n] for n in full]
            videos = sampler(images, seed=seeds, **shape, **options)
            for n, frames in zip(rows, videos, strict=False):
                write_video(files[n], protocol.score(frames))
            advance(len(rows))
    return files


def read_strip(path: Path, num_frames: int) -> np.ndarray:
    """The frames uint8 `[t, h, w, 3]` of a clip that `generate` kept. Raises VideoError."""
    strip = read_image(path)
    if strip.shape[1] % num_frames:
        raise VideoError(f"{path}: {strip.shape[1]} pixels are not {num_frames} frames")
    return rearrange(strip, "h (t w) c -> t h w c", t=num_frames)


def _claim(folder: Path, manifest: dict) -> None:
    """Writes how the clips of `folder` are made, or checks it against what an earlier run wrote."""
    path = folder / "manifest.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        earlier = read_json(path)
        # One list may be longer; as far as both go, clips and seeds must agree.
        common = min(len(earlier.get("clips", [])), len(manifest["clips"]))
        cut = {"clips": slice(common), "seeds": slice(common)}
        before, now = ({k: digest(v[cut[k]]) if k in cut else v for k, v in x.items()} for x in (earlier, manifest))
        changed = differences(before, now)
        if changed:
            what = "; ".join(changed)
            raise VideoError(f"{folder} holds clips made differently: {what}. Use another --out, or remove it")
        if common == len(manifest["clips"]):
            return
    write_json(path, manifest)

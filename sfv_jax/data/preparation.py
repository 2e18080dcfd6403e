"""Conversion of a folder of videos to a latent cache: choice of clips, shards, decoding ahead of encoding, resuming.

Finished shards are kept, so an interrupted job continues; several workers share a job by taking every n-th shard.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.data import latents, video
from sfv_jax.data.latents import LatentError
from sfv_jax.data.listing import VIDEO_SUFFIXES, list_videos
from sfv_jax.data.settings import PrepareError, Settings
from sfv_jax.data.video import VideoError
from sfv_jax.runtime.files import write_json
from sfv_jax.runtime.locks import Lock
from sfv_jax.runtime.progress import progress

# (frames uint8 [b, t, h, w, 3], seeds uint32 [b]) -> {"latents", "cond_latent", "image_embed"}, each [b, ...]
Encode = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


YOUNGER = {"fit": "crop"}  # settings that caches may lack, with the value that does what was done then


@dataclasses.dataclass(frozen=True)
class Clip:
    """Part of a video: `source` is the video's path below the folder, `start` is in seconds."""

    source: str
    start: float = 0.0

    @property
    def file(self) -> str:
        """The source, with bytes that are not UTF-8 escaped: records and reports contain text."""
        return os.fsencode(self.source).decode(errors="backslashreplace")

    @property
    def key(self) -> str:
        """Name of the clip in records and reports."""
        return f"{self.file}@{self.start:.3f}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """The planned clips of one shard, usable or not; see `report`."""

    out: Path
    split: str
    index: int
    total: int
    clips: tuple[Clip, ...]

    @property
    def path(self) -> Path:
        """The shard."""
        return latents.shard_path(self.out, self.split, self.index, self.total)

    @property
    def report_path(self) -> Path:
        """The file of `report`."""
        return self.out / "progress" / f"{self.split}-{self.index:05d}.json"

    def report(self) -> dict | None:
        """Returns `{"count", "shapes", "skipped"}`; None if the shard or its report is missing or damaged."""
        with contextlib.suppress(LatentError):
            report = latents.read_json(self.report_path, ("count", "shapes", "skipped"))
            if report and report["count"] == latents.count_records(self.path):
                return report
        return None

    @property
    def lock(self) -> Lock:
        """The lock of the process that makes the shard."""
        return Lock(self.report_path.with_suffix(".lock"), str(self.path))


def run(
    videos: str | os.PathLike,
    out: str | os.PathLike,
    encode: Encode,
    settings: Settings,
    *,
    batch_size: int = 1,
    threads: int = 4,
    worker: int = 0,
    workers: int = 1,
) -> dict | None:
    """Makes or continues the cache `out` of all videos under the folder `videos`.

    Args:
      videos: folder of videos, searched recursively.
      out: folder of the cache.
      encode: function from frames uint8 `[b, t, h, w, 3]` and seeds uint32 `[b]`, one per clip, to a dict of
        `latents [b, t, h', w', c]`, `cond_latent [b, h', w', c]` and `image_embed [b, d]`, the first two unscaled. It
        always gets `batch_size` clips; the result for a clip must not depend on the others.
      settings: settings of the cache.
      batch_size: clips encoded at a time.
      threads: number of threads that decode ahead of `encode`.
      worker: index of this worker; it makes every `workers`-th shard.
      workers: number of workers that share the job.
    Returns:
      The manifest, or None if other workers have unfinished shards.
    Raises:
      VideoError: if `videos` contains no usable video.
      LatentError: if `out` was made with other settings or videos, or an encoded clip is not finite.
      LockError: if another process makes the shard that is next.
      PrepareError: if `worker` is not in [0, workers), or `out` cannot be written.
    """
    if not 0 <= worker < workers:
        raise PrepareError(f"worker {worker} of {workers}: count from 0")
    out = Path(out)
    clips = plan(videos, settings)
    shards = _shards(out, clips, settings.shard_size)
    try:
        (out / "progress").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"--out {out} cannot be used ({error.strerror}): name a folder that can be written") from (
            error
        )
    manifest = _claim(out, clips, settings)
    _check_files(out, Path(videos), shards)
    mine = shards[worker::workers]
    with progress(sum(len(shard.clips) for shard in mine), "clips") as advance:
        for shard in mine:
            if shard.report():
                advance(len(shard.clips))
                continue
            skipped: list[dict] = []
            decoded = _decode(Path(videos), shard.clips, settings, threads, skipped, advance)
            with shard.lock, contextlib.closing(decoded):
                count, shapes = latents.write_shard(shard.path, _records(decoded, encode, settings, batch_size))
                write_json(shard.report_path, {"count": count, "shapes": shapes, "skipped": skipped})
    return _finish(out, shards, manifest)


def plan(videos: str | os.PathLike, settings: Settings) -> dict[str, list[Clip]]:
    """Returns the planned clips of the videos under a folder by split; all clips of a file are in one split.

    Raises:
      VideoError: if there are no video files.
    """
    files = list_videos(videos)
    if not files:
        raise VideoError(f"{videos}: no video files ({', '.join(VIDEO_SUFFIXES)})")
    splits: dict[str, list[Clip]] = {"train": [], "heldout": []}
    for file in files:
        source = file.relative_to(videos).as_posix()
        heldout = _hash(settings.seed, Clip(source).file) < settings.heldout_fraction * 2**32
        splits["heldout" if heldout else "train"] += [Clip(source, start) for start in _starts(file, settings)]
    return {split: clips for split, clips in splits.items() if clips}


def _starts(file: Path, settings: Settings) -> list[float]:
    """Returns the starts of the clips of a video in seconds: evenly spread, not overlapping, at least one."""
    if settings.clips_per_video == 1:
        return [0.0]
    try:
        seconds = video.duration(file)
    except VideoError:
        return [0.0]  # the error is reported when the clip is read
    fit = int(seconds * settings.fps / settings.num_frames + 1e-6)
    count = max(1, min(settings.clips_per_video, fit))
    return [round(seconds * k / count, 3) for k in range(count)]


def _hash(seed: int, name: str) -> int:
    """Returns 32 bits that depend on the name and the seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def _shards(out: Path, plan: dict[str, list[Clip]], size: int) -> list[Shard]:
    shards = []
    for split, clips in plan.items():
        total = -(-len(clips) // size)
        shards += [Shard(out, split, k, total, tuple(clips[k * size : (k + 1) * size])) for k in range(total)]
    return shards


def _claim(out: Path, plan: dict[str, list[Clip]], settings: Settings) -> dict:
    """Writes the manifest of a new cache, or checks it against that of an earlier run."""
    names = "\n".join(f"{split} {clip.key}" for split, clips in plan.items() for clip in clips)
    manifest: dict[str, Any] = {
        "schema": latents.SCHEMA,
        "settings": dataclasses.asdict(settings),
        "planned": {split: len(clips) for split, clips in plan.items()},
        "videos": hashlib.sha256(names.encode()).hexdigest(),
    }
    earlier = latents.read_json(out / latents.MANIFEST, ("settings", "schema", "videos"))
    if earlier is None:
        write_json(out / latents.MANIFEST, manifest)
        return manifest
    then, now = (
        {**YOUNGER, **m["settings"], "schema": m["schema"], "videos": m["videos"]} for m in (earlier, manifest)
    )
    changed = [f"{name} (was {then.get(name)}, is {now[name]})" for name in now if then.get(name) != now[name]]
    if changed:
        raise LatentError(f"{out} has other settings: {', '.join(changed)}; use another --out or the same settings")
    return manifest


def _check_files(out: Path, folder: Path, shards: list[Shard]) -> None:
    """Records size and time of every video; refuses to go on if one of a finished shard was replaced since."""
    path, sources = out / "videos.json", sorted({clip.source for shard in shards for clip in shard.clips})
    found = {source: [(at := (folder / source).stat()).st_size, at.st_mtime_ns] for source in sources}
    earlier = latents.read_json(path) or {}  # a version before this one recorded nothing
    for shard in shards:
        changed = [c.source for c in shard.clips if c.source in earlier and earlier[c.source] != found[c.source]]
        if changed and shard.report():
            raise LatentError(
                f"{folder / changed[0]} changed since {shard.path} was made from it: delete {shard.report_path} to "
                f"make that shard again, or use another --out; if only times of files differ, delete {path}"
            )
    if found != earlier:
        write_json(path, found)


def _decode(
    folder: Path, clips: tuple[Clip, ...], settings: Settings, threads: int, skipped: list[dict], advance: Callable
) -> Generator[tuple[Clip, np.ndarray], None, None]:
    """Yields the usable clips in order, decoded ahead on threads; appends the others to `skipped`."""

    def read(clip):
        size = {"height": settings.height, "width": settings.width, "fit": settings.fit}
        return video.read_clip(folder / clip.source, settings.num_frames, settings.fps, clip.start, **size)

    todo, pending = iter(clips), collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        while True:
            # Decoded clips are large: keep only enough to occupy the threads.
            for clip in itertools.islice(todo, 2 * threads - len(pending)):
                pending.append((clip, pool.submit(read, clip)))
            if not pending:
                return
            clip, future = pending.popleft()
            try:
                frames = future.result()
            except VideoError as error:
                skipped.append({"clip": clip.key, "reason": str(error)})
            else:
                yield clip, frames
            advance(1)
    finally:
        pool.shutdown(cancel_futures=True)


def _records(
    decoded: Iterator[tuple[Clip, np.ndarray]], encode: Encode, settings: Settings, batch_size: int
) -> Iterator[dict]:
    """Encodes in batches and yields a record for each clip."""
    while batch := list(itertools.islice(decoded, batch_size)):
        # Always a full batch: for a smaller last one the encoder would be compiled again.
        full = batch + batch[-1:] * (batch_size - len(batch))
        seeds = np.array([_hash(settings.seed, clip.key) for clip, _ in full], np.uint32)
        encoded = encode(np.stack([frames for _, frames in full]), seeds)
        for row, (clip, _) in enumerate(batch):
            yield {
                **{name: latents.to_float16(clip.key, name, encoded[name][row]) for name in latents.ARRAYS},
                "fps": settings.fps,
                "motion_bucket_id": settings.motion_bucket_id,
                "noise_aug_strength": settings.noise_aug_strength,
                "key": clip.key,
                "source": clip.file,
                "start": clip.start,
                "schema": latents.SCHEMA,
            }


def _finish(out: Path, shards: list[Shard], manifest: dict) -> dict | None:
    """Completes the cache if every shard is finished."""
    reports = [report for shard in shards if (report := shard.report())]
    missing = len(shards) - len(reports)
    if missing:
        print(f"{missing} of {len(shards)} shards are left to other workers; the last one completes {out}")
        return None
    skipped = [entry for report in reports for entry in report["skipped"]]
    counts: dict[str, list[int]] = collections.defaultdict(list)
    for shard, report in zip(shards, reports, strict=True):
        counts[shard.split].append(report["count"])
    counts = {split: lengths for split, lengths in counts.items() if sum(lengths)}
    if not counts:
        for shard in shards:  # so that another attempt reads the files again
            shard.report_path.unlink()
        reasons = "".join(f"\n  {entry['reason']}" for entry in skipped[:10])
        raise VideoError(f"none of {len(skipped)} clips is usable:{reasons}")
    shapes = next(report["shapes"] for report in reports if report["count"])
    manifest |= {"clips": {split: sum(lengths) for split, lengths in counts.items()}, "skipped": skipped}
    write_json(out / latents.MANIFEST, manifest)
    latents.write_metadata(out, shapes, counts)
    for path in (out / "progress").iterdir():  # of workers killed between a report and the release of its lock
        if ".lock" in path.name:
            path.unlink(missing_ok=True)
    return manifest


def make_encoder(codec, noise_aug_strength: float, seed: int) -> Encode:
    """Returns the `encode` of `run` for a codec of `sfv_jax.models.codec`."""
    import jax

    def encode(frames, seeds):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), seeds)
        cond_latent, image_embed = codec.condition(frames[:, 0], keys, noise_aug_strength)
        encoded = {"latents": codec.encode(frames), "cond_latent": cond_latent, "image_embed": image_embed}
        return jax.tree.map(np.asarray, encoded)

    return encode

"""Image files to video files, each with a JSON record of its settings. This module does not import JAX."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfv_jax.choices import VIDEO_FORMATS
from sfv_jax.data.images import ImageError, read_image, readable
from sfv_jax.data.listing import IMAGE_SUFFIXES, list_images
from sfv_jax.data.video import write_video
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import FileError, check_folder, one_line, read_json, replacing, sha256
from sfv_jax.runtime.progress import progress
from sfv_jax.runtime.versions import package_versions
from sfv_jax.sampling.extension import Extension

if TYPE_CHECKING:
    from sfv_jax.sampling.sampler import Sampler

OPTIONS = (  # arguments of `Sampler.__call__` that are flags
    "steps",
    "sampler",
    "num_frames",
    "height",
    "width",
    "fit",
    "fps",
    "motion_bucket_id",
    "noise_aug_strength",
    "decode_chunk_size",
)
GIF_FPS = 50  # delays of a GIF are hundredths of a second, and viewers slow down one of 0.01 s


class SampleError(UserError):
    """Impossible request on the command line, or images that cannot be read; the message gives the remedy."""


@dataclass(frozen=True)
class Job:
    """An image to sample.

    Attributes:
      number: number of the image, which is added to the seed.
      image, video: the files.
    """

    number: int
    image: Path
    video: Path

    @property
    def record(self) -> Path:
        """The file of the record."""
        return self.video.with_suffix(".json")


@dataclass(frozen=True)
class Settings:
    """Settings of all jobs.

    Attributes:
      options: the `OPTIONS` and guidance of `Sampler.__call__`.
      seed: seed of image 0; that of image n is `seed + n`.
      batch_size: images sampled at a time.
      timed: print and record the seconds of each stage.
      origin: more fields of the records, such as the checkpoint.
      extension: how videos are extended; None: not at all.
    """

    options: dict
    seed: int
    batch_size: int
    timed: bool
    origin: dict
    extension: Extension | None = None


def jobs(image: Path, out: Path, kind: str) -> list[Job]:
    """Returns the jobs for an image or for all images under a folder (`listing.list_images`).

    The videos of a folder have the paths of the images below it. Images whose videos would have one name (`cat.png`
    and `cat.jpg`) keep their suffixes in it (`cat_png.mp4` and `cat_jpg.mp4`).

    Args:
      image: an image or a folder of images.
      out: the video, or for a folder of images the folder of the videos.
      kind: format of the videos of a folder, one of `VIDEO_FORMATS`.

    Raises:
      SampleError: if `out` does not go with `image`, or a folder has no image.
    """
    if not image.exists():
        raise SampleError(f"--image {image}: there is no such file or folder")
    if not image.is_dir():
        if out.is_dir():
            raise SampleError(f"--out {out} is a folder: for one image name the video, such as {out / image.stem}.mp4")
        if out.suffix.lower()[1:] not in VIDEO_FORMATS:
            found = out.suffix or "a file without suffix"
            raise SampleError(f"--out {out}: cannot write {found}; use {', '.join(f'.{x}' for x in VIDEO_FORMATS)}")
        read_image(image)
        return [Job(0, image, out)]
    if out.suffix.lower()[1:] in VIDEO_FORMATS and not out.is_dir():
        raise SampleError(f"--image {image} is a folder, so --out must be a folder too, not {out}; see --format")
    real = Path(os.path.realpath(out))
    inside = Path(os.path.realpath(image)) in (real, *real.parents)
    if inside and f".{kind}" in IMAGE_SUFFIXES:
        raise SampleError(f"--out {out} is in --image {image}: the next run would take each .{kind} for an image")
    images = list_images(image)
    if not images:
        raise SampleError(f"{image} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    if not any(map(readable, images)):
        read_image(images[0])
    names = _names([path.relative_to(image) for path in images])
    return [Job(n, path, out / f"{name}.{kind}") for n, (path, name) in enumerate(zip(images, names, strict=True))]


def _names(images: list[Path]) -> list[str]:
    """Returns distinct names of videos, with folders and without suffix, also where case does not distinguish files."""
    stems = [str(path.with_suffix("")) for path in images]
    count = Counter(map(str.casefold, stems))
    names = [
        stem if count[stem.casefold()] == 1 else f"{stem}_{path.suffix[1:]}"
        for stem, path in zip(stems, images, strict=True)
    ]
    first: dict[str, Path] = {}
    for name, path in zip(names, images, strict=True):
        other = first.setdefault(name.casefold(), path)
        if other is not path:
            raise SampleError(f"{other} and {path} would have one video, {name}: rename one of them")
    return names


def check_outputs(todo: list[Job], fps: float, overwrite: bool) -> None:
    """Checks that all videos and records can be written, and replace no file that this module did not write.

    Args:
      todo: the jobs.
      fps: frame rate of the videos.
      overwrite: permits replacing any file but an image of `todo`.

    Raises:
      SampleError: if a video or record would replace another file, or a GIF cannot have this rate.
      UserError: if the folder cannot be written to.
    """
    if fps > GIF_FPS and todo[0].video.suffix.lower() == ".gif":
        raise SampleError(f"--fps {fps:g}: a GIF shows at most {GIF_FPS} frames per second; use less or another format")
    for folder in sorted({job.video.parent for job in todo}):
        check_folder(folder, f"--out: {folder}")
    inputs = {_identity(job.image) for job in todo}
    problems = []
    for job in todo:
        files = [path for path in (job.video, job.record) if os.path.lexists(path)]
        taken = [f"{path} is a folder" for path in files if path.is_dir()]
        taken += [f"{path} is an image to be read" for path in files if _identity(path) in inputs]
        foreign = None if overwrite or taken else _foreign(job)
        problems += [*map(one_line, taken), *([one_line(foreign)] if foreign else [])]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        remedy = "nothing was written; choose another --out" + ("" if overwrite else ", or pass --overwrite")
        raise SampleError("\n  ".join([f"{problems[0]}: {remedy}", *problems[1:10], *more]))


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns numbers that the file shares with no other; None for a link that leads nowhere."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _foreign(job: Job) -> str | None:
    """Returns which file of a job exists and was not written by `run`; None if both may be replaced."""
    if not os.path.lexists(job.record):
        return f"{job.video} has no record {job.record.name}" if os.path.lexists(job.video) else None
    try:
        made = read_json(job.record, "", ("video", "image_sha256"))
        other = job.video.with_name(made["video"])
    except (FileError, ValueError, TypeError):  # the last two of what is no name of a file
        return f"{job.record} is no record of this command"
    if other != job.video:
        if os.path.lexists(other) or os.path.lexists(job.video):
            return f"{job.record}, where its record goes, is that of {other.name}"
        return None
    changed = "video_sha256" in made and job.video.is_file() and made["video_sha256"] != sha256(job.video)
    return f"{job.video} was changed since it was made" if changed else None


def run(sampler: "Sampler", todo: list[Job], settings: Settings) -> None:
    """Writes a video and its record for each image, and goes on where an image cannot be read.

    Raises:
      SampleError: at the end, if images could not be read; lists them. Or at once, if a file cannot be written.
    """
    unreadable: list[str] = []
    for batch, size in _batches(sampler, todo, settings, unreadable):
        _sample(sampler, batch, size, settings)
    if unreadable:
        lines = "".join(f"\n  {line}" for line in unreadable)
        raise SampleError(f"{len(unreadable)} of {len(todo)} images could not be read:{lines}")


def _batches(
    sampler: "Sampler", todo: list[Job], settings: Settings, unreadable: list[str]
) -> Iterator[tuple[list[tuple[Job, np.ndarray]], tuple[int, int]]]:
    """Yields consecutive images of one video size `(height, width)`, at most a batch; lists those it cannot read."""
    batch: list[tuple[Job, np.ndarray]] = []
    size = (0, 0)
    for job in todo:
        try:
            pixels = read_image(job.image)
        except ImageError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            unreadable.append(str(error))
            continue
        own = sampler.size(pixels.shape[:2], settings.options["height"], settings.options["width"])
        if batch and (own != size or len(batch) == settings.batch_size):
            yield batch, size
            batch = []
        batch.append((job, pixels))
        size = own
    if batch:
        yield batch, size


def _sample(sampler: "Sampler", batch: list[tuple[Job, np.ndarray]], size: tuple[int, int], settings: Settings) -> None:
    """Writes one video and its record for each image of a batch, all of one video size `(height, width)`."""
    for job, pixels in batch:
        if size != pixels.shape[:2]:
            alike = abs(pixels.shape[0] * size[1] / (pixels.shape[1] * size[0]) - 1) < 0.01
            how = "" if alike else f" by --fit={settings.options['fit']}"
            if settings.options["fit"] == "crop" and not alike:
                ratio = pixels.shape[0] * size[1] / (pixels.shape[1] * size[0])
                how += f", which cuts {1 - min(ratio, 1 / ratio):.0%} of the image"
            shape = f"{pixels.shape[0]}x{pixels.shape[1]}"
            print(f"{one_line(job.image)}: {shape} to {size[0]}x{size[1]} (height x width){how}", flush=True)
    times: dict[str, float] | None = {} if settings.timed else None
    began = time.monotonic()
    options = settings.options | {"height": size[0], "width": size[1]}
    seeds = [settings.seed + job.number for job, _ in batch]
    about = settings.origin | surroundings(len(batch))
    if len(batch) == 1 and times is None and sampler.decoder != "full" and batch[0][0].video.suffix.lower() == ".mp4":
        _stream(sampler, *batch[0], settings, {"seed": seeds[0]} | options, about | {"times": None})
        return
    make = sampler if settings.extension is None else partial(sampler.extend, extension=settings.extension)
    videos = make([pixels for _, pixels in batch], seed=seeds, times=times, watch=progress, **options)
    seconds = time.monotonic() - began
    about |= {"seconds": seconds, "times": times}
    together = f" (with {len(batch) - 1} more)" if len(batch) > 1 else ""
    for (job, _), seed, frames in zip(batch, seeds, videos, strict=True):
        write(job, frames, _settings({"seed": seed} | options, len(frames), settings.extension) | about)
        made = f"{len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} in {seconds:.2f} s{together}"
        print(f"{one_line(job.video)}: {made}", flush=True)
    if times is not None:
        print("seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))


def _stream(sampler: "Sampler", job: Job, pixels: np.ndarray, settings: Settings, options: dict, about: dict) -> None:
    """Writes one video and its record; frames are encoded while the next ones are decoded."""
    began = time.monotonic()
    chosen = {name: value for name, value in options.items() if name not in ("seed", "decode_chunk_size")}
    chosen["watch"] = progress
    extension = settings.extension or Extension(0)
    count = extension.length(options["num_frames"] or sampler.unet.num_frames)

    def call(images: Sequence[np.ndarray], seed: list[int], **options) -> Iterator[np.ndarray]:
        return (frame[None] for frame in sampler.stream(images[0], seed=seed[0], **options))

    frames = (frame[0] for frame in extension.frames(call, [pixels], [options["seed"]], chosen))
    write(job, frames, _settings(options, count, settings.extension) | about)
    size = f"{options['height']}x{options['width']}"
    print(
        f"{one_line(job.video)}: {count} frames of {size} in {time.monotonic() - began:.2f} s, written as they came",
        flush=True,
    )


def origin_of(sampler: "Sampler", checkpoint: str | Path, load: dict, mesh: list[str] | None = None) -> dict:
    """Returns the fields of records that say where videos come from.

    Args:
      sampler: the loaded model.
      checkpoint, load, mesh: arguments of its loading.
    """
    about = {"checkpoint": str(checkpoint), "step": sampler.step, "mesh": mesh}
    return about | load | {"decoder": sampler.decoder}


def surroundings(batch_size: int) -> dict:
    """Returns the fields of records that say with what videos were made, `batch_size` at a time."""
    return {"packages": package_versions("jax", "flax"), "batch_size": batch_size}


def _settings(options: dict, length: int, extension: Extension | None) -> dict:
    """Returns the settings of a video of `length` frames for its record."""
    extended = {} if extension is None else {"extend": extension.record(options["seed"], length)}
    return options | {"num_frames": length} | extended


def write(job: Job, frames: np.ndarray | Iterator[np.ndarray], settings: dict) -> None:
    """Writes a video between two writes of its record: a video without a record would count as someone else's.

    An .mp4 contains the first record as its comment. The second adds `video_sha256`, by which a change of the video is
    noticed before it is replaced, and the seconds of a video whose frames come during its writing.

    Raises:
      SampleError: if a file cannot be written.
    """
    made = {"video": job.video.name, "image": str(job.image), "image_sha256": sha256(job.image)} | settings
    began = time.monotonic()
    try:
        _write_json(job.record, made)
        # An absolute path: FFmpeg takes "a:" of "a:b.mp4" for a protocol.
        write_video(job.video.absolute(), frames, fps=settings["fps"], comment=json.dumps(made))
        made = {"seconds": time.monotonic() - began} | made
        _write_json(job.record, made | {"video_sha256": sha256(job.video)})
    except OSError as error:
        raise SampleError(f"{one_line(job.video)}: cannot write: {error.strerror or error}") from error


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))

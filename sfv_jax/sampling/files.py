"""Image files to video files, each with a JSON record of its settings."""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from sfv_jax.data.video import IMAGE_SUFFIXES, read_image, write_video
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import replacing
from sfv_jax.runtime.versions import package_versions
from sfv_jax.sampling.sampler import Sampler

OPTIONS = (  # arguments of `Sampler.__call__` that are flags
    "steps",
    "sampler",
    "num_frames",
    "height",
    "width",
    "fps",
    "motion_bucket_id",
    "noise_aug_strength",
    "decode_chunk_size",
)
Job = tuple[int, Path, Path]  # number of the image, which is added to the seed; image; video


class SampleError(UserError):
    """Impossible request on the command line; the message gives the remedy."""


def jobs(image: Path, out: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Returns the pairs `(image, video)` of paths for an image or for all images of a folder.

    Args:
      image: an image or a folder of images.
      out: the video, or for a folder of images the folder of the videos.
      suffix: suffix of videos in a folder, such as ".mp4".

    Raises:
      SampleError: if a folder has no image, or its videos would go to a single file.
    """
    if not image.is_dir():
        return [(image, out)]
    if out.suffix:
        raise SampleError(f"--image {image} is a folder, so --out must be a folder too, not {out}; see --format")
    images = sorted(p for p in image.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SampleError(f"{image} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [(p, out / f"{p.stem}{suffix}") for p in images]


def record(path: Path, settings: dict) -> None:
    """Writes `settings` as JSON next to the video `path`, completely or not at all."""
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def batches(
    sampler: Sampler, pairs: list[tuple[Path, Path]], options: dict, size: int
) -> Iterator[tuple[list[Job], tuple[int, int]]]:
    """Yields `(batch, video_size)`; a batch is up to `size` consecutive jobs of one video size `(height, width)`."""

    def size_of(job: Job) -> tuple[int, int]:
        return sampler.size(read_image(job[1]), options["height"], options["width"])

    for shape, jobs_ in groupby(((n, *job) for n, job in enumerate(pairs)), size_of):
        group = list(jobs_)
        for first in range(0, len(group), size):
            yield group[first : first + size], shape


def run(
    sampler: Sampler,
    batch: list[Job],
    size: tuple[int, int],
    *,
    seed: int,
    options: dict,
    origin: dict,
    timed: bool,
) -> None:
    """Writes one video and its record for each image of a batch.

    Args:
      sampler: the sampler.
      batch: jobs of one video size.
      size: `(height, width)` of the videos.
      seed: seed of image 0; that of image n is `seed + n`.
      options: the `OPTIONS` and guidance of `Sampler.__call__`.
      origin: more fields of the records, such as the checkpoint.
      timed: print and record the seconds of each stage.
    """
    images = [read_image(image) for _, image, _ in batch]
    for (_, image, _), pixels in zip(batch, images, strict=True):
        if size != pixels.shape[:2]:
            print(f"{image}: {pixels.shape[0]}x{pixels.shape[1]} resized to {size[0]}x{size[1]} (height x width)")
    times: dict[str, float] | None = {} if timed else None
    began = time.monotonic()
    options = options | {"height": size[0], "width": size[1]}
    videos = sampler(images, seed=[seed + n for n, _, _ in batch], times=times, **options)
    seconds = time.monotonic() - began
    packages = package_versions("jax", "flax")
    for (n, image, out), frames in zip(batch, videos, strict=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_video(out, frames, fps=options["fps"])
        settings = {"image": str(image), "image_sha256": hashlib.sha256(image.read_bytes()).hexdigest()}
        settings |= {"seed": seed + n} | options | {"num_frames": len(frames), "packages": packages} | origin
        record(out, settings | {"batch_size": len(batch), "seconds": seconds, "times": times})
        together = f" (with {len(batch) - 1} more)" if len(batch) > 1 else ""
        print(f"{out}: {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} in {seconds:.2f} s{together}")
    if times is not None:
        print("seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))

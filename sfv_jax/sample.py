"""Make videos from images.

    python -m sfv_jax.sample --checkpoint runs/sfv --image in.png --out out.mp4

`--checkpoint` is a model folder or the workdir of a training run. `--image` may be a folder: every image in it becomes
a video in the folder `--out`, `--batch_size` images of a size at a time. The suffix chooses the format: .mp4, .gif,
.webp, or .png for a strip of frames. Beside each video a .json records all that is needed to make it again.
"""

import hashlib
import json
import math
import sys
import time
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import jax
from absl import app, flags, logging

from sfv_jax.checkpoints.run import WorkdirError
from sfv_jax.data.video import VideoError, read_image, write_video
from sfv_jax.diffusion.solvers import SAMPLERS
from sfv_jax.models.networks import DTYPES
from sfv_jax.runtime import compilation
from sfv_jax.runtime.files import replacing
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampler import Sampler
from sfv_jax.weights.folders import WeightsError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OPTIONS = (
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
NUMBERS = {"guidance": ((2,), "two numbers, e.g. 1.0,3.0"), "mesh": ((2, 3), "two or three numbers, e.g. 4,2 or 1,1,8")}


class SampleError(ValueError):
    """The command line asks for something impossible; the message says what to change."""


def jobs(image: Path, out: Path, suffix: str) -> list[tuple[Path, Path]]:
    """(image, video) pairs of a file or a folder.

    Raises:
      SampleError: if there is no image, or a folder is to become a single file.
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
    """Writes `settings` as JSON beside the video `path`, atomically."""
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def numbers(name: str, values: list[str] | None, kind: type) -> tuple | None:
    """The numbers of the flag `name`; None if it was not given.

    Raises:
      SampleError: if they are not as many as `NUMBERS` says, or not numbers.
    """
    if not values:
        return None
    counts, wanted = NUMBERS[name]
    try:
        found = tuple(kind(value) for value in values)
    except ValueError:
        found = ()
    if len(found) not in counts:
        raise SampleError(f"--{name}={','.join(values)}: give {wanted}")
    return found


def batches(sampler: Sampler, pairs: list[tuple[Path, Path]], options: dict, size: int):
    """Yields lists of `(n, image, out)`, consecutive images whose videos have one size, at most `size` of them; and it.

    `n` is the image's place in `pairs`, which its seed counts by.
    """

    def size_of(job: tuple[int, Path, Path]) -> tuple[int, int]:
        return sampler.size(read_image(job[1]), options["height"], options["width"])

    for shape, jobs_ in groupby(((n, *job) for n, job in enumerate(pairs)), size_of):
        group = list(jobs_)
        for first in range(0, len(group), size):
            yield group[first : first + size], shape


def run(sampler: Sampler, batch: list, size: tuple[int, int], *, seed: int, options: dict, origin: dict, timed: bool):
    """Some images to one video each and its record."""
    images = [read_image(image) for _, image, _ in batch]
    for (_, image, _), pixels in zip(batch, images, strict=True):
        if size != pixels.shape[:2]:
            print(f"{image}: {pixels.shape[0]}x{pixels.shape[1]} resized to {size[0]}x{size[1]} (height x width)")
    times, began = {} if timed else None, time.monotonic()
    options = options | {"height": size[0], "width": size[1]}
    videos = sampler(images, seed=[seed + n for n, _, _ in batch], times=times, **options)
    seconds = time.monotonic() - began
    packages = {name: version(name) for name in ("sfv_jax", "jax", "flax")}
    for (n, image, out), frames in zip(batch, videos, strict=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_video(out, frames, fps=options["fps"])
        settings = {"image": str(image), "image_sha256": hashlib.sha256(image.read_bytes()).hexdigest()}
        settings |= {"seed": seed + n} | options | {"num_frames": len(frames), "packages": packages} | origin
        record(out, settings | {"batch_size": len(batch), "seconds": seconds, "times": times})
        together = f" (with {len(batch) - 1} more)" if len(batch) > 1 else ""
        print(f"{out}: {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} in {seconds:.2f} s{together}")
    if timed:
        print("seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    compilation.set_up()
    try:
        pairs = jobs(Path(FLAGS.image), Path(FLAGS.out), f".{FLAGS.format}")
        options = {name: FLAGS[name].value for name in OPTIONS}
        options["guidance"] = numbers("guidance", FLAGS.guidance, float)
        mesh = numbers("mesh", FLAGS.mesh, int)
        load = {name: FLAGS[name].value for name in ("dtype", "vae_dtype", "decode_pixels", "raw", "check_finite")}
        if mesh:
            mesh = make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
        sampler = Sampler.load(FLAGS.checkpoint, mesh=mesh, **load)
        origin = {"checkpoint": str(FLAGS.checkpoint), "step": sampler.step, "mesh": FLAGS.mesh} | load
        for batch, size in batches(sampler, pairs, options, FLAGS.batch_size):
            run(sampler, batch, size, seed=FLAGS.seed, options=options, origin=origin, timed=FLAGS.times)
    except (SampleError, VideoError, WeightsError, WorkdirError, ValueError) as error:
        sys.exit(f"sample: {error}")


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run", required=True)
    flags.DEFINE_string("image", None, "image, or folder of images", required=True)
    flags.DEFINE_string("out", None, "video (.mp4 .gif .webp .png), or folder for a folder of images", required=True)
    flags.DEFINE_enum("format", "mp4", ["mp4", "gif", "webp", "png"], "of the videos of a folder")
    flags.DEFINE_integer("steps", 1, "calls of the UNet; 1: one forward pass", lower_bound=1)
    flags.DEFINE_enum(
        "sampler",
        "euler",
        list(SAMPLERS),
        "euler: SVD; sfv: up to 3 steps at an SF-V generator's training levels, fresh noise in between (sfv_euler:"
        " none); animatelcm: up to 40 steps, fresh noise in between",
    )
    flags.DEFINE_integer("seed", 0, "of the first image; the following ones count up")
    flags.DEFINE_integer("num_frames", None, "default: the model's clip length", lower_bound=1)
    flags.DEFINE_integer("height", None, "default: the image's, in whole latent cells", lower_bound=1)
    flags.DEFINE_integer("width", None, "default: the image's, in whole latent cells", lower_bound=1)
    flags.DEFINE_float("fps", 7, "frame rate the model is told (less one) and the video is written with")
    flags.DEFINE_float("motion_bucket_id", 127, "amount of motion the model is told")
    flags.DEFINE_float("noise_aug_strength", 0.02, "deviation of the noise on the condition image, pixels in [-1, 1]")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "compute and parameter dtype of the UNet")
    flags.DEFINE_enum("vae_dtype", "float32", list(DTYPES), "compute dtype of the VAE's decoder")
    flags.DEFINE_integer(
        "decode_chunk_size",
        None,
        "frames decoded at a time; default: all. Smaller chunks save memory and flicker where they meet",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "decode_pixels",
        None,
        "pixels, over all frames, that a device decodes at a time, 0: all; same frames. Default: by its memory",
        lower_bound=0,
    )
    flags.DEFINE_integer("batch_size", 1, "images of a folder sampled at a time", lower_bound=1)
    flags.DEFINE_list("mesh", None, "data,fsdp[,spatial]: devices that share the batch, batch and parameters, rows")
    flags.DEFINE_bool("times", False, "print and record the seconds of each stage (the first call compiles)")
    flags.DEFINE_bool("check_finite", True, "stop at NaN or infinity and name the stage that made it")
    flags.DEFINE_bool("raw", False, "the trained weights instead of their moving average (workdirs only)")


if __name__ == "__main__":
    _define_flags()
    compilation.define_flags()
    app.run(main)

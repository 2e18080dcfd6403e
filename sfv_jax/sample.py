"""Make videos from images.

    python -m sfv_jax.sample --checkpoint runs/sfv --image in.png --out out.mp4

`--checkpoint` is a model folder or the workdir of a training run. `--image` may be a folder: every image in it becomes
a video in the folder `--out`. The suffix chooses the format: .mp4, .gif, .webp, or .png for a strip of frames. Beside
each video a .json records all that is needed to make it again.
"""

import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging

from sfv_jax.checkpoint import WorkdirError
from sfv_jax.data.video import VideoError, read_image, replacing, write_video
from sfv_jax.sampler import Sampler
from sfv_jax.weights.folders import WeightsError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OPTIONS = ("steps", "num_frames", "height", "width", "fps", "motion_bucket_id", "noise_aug_strength")


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


def run(sampler: Sampler, image: Path, out: Path, *, seed: int, guidance, options: dict, origin: dict) -> None:
    """One image to one video and its record."""
    pixels = read_image(image)
    size = sampler.size(pixels, options["height"], options["width"])
    if size != pixels.shape[:2]:
        print(f"{image}: {pixels.shape[0]}x{pixels.shape[1]} resized to {size[0]}x{size[1]} (height x width)")
    began = time.monotonic()
    options = options | {"height": size[0], "width": size[1]}
    frames = sampler([pixels], seed=seed, guidance=guidance, **options)[0]
    seconds = time.monotonic() - began
    out.parent.mkdir(parents=True, exist_ok=True)
    write_video(out, frames, fps=options["fps"])
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    packages = {name: version(name) for name in ("sfv_jax", "jax", "flax")}
    settings = {"image": str(image), "image_sha256": digest, "seed": seed, "guidance": guidance} | options
    record(out, settings | {"num_frames": len(frames), "packages": packages, **origin})
    print(f"{out}: {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} in {seconds:.2f} s")


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        pairs = jobs(Path(FLAGS.image), Path(FLAGS.out), f".{FLAGS.format}")
        if FLAGS.guidance and len(FLAGS.guidance) != 2:
            raise SampleError("--guidance takes the weights of the first and the last frame, e.g. 1.0,3.0")
        guidance = tuple(float(g) for g in FLAGS.guidance) if FLAGS.guidance else None
        sampler = Sampler.load(FLAGS.checkpoint, dtype=FLAGS.dtype, raw=FLAGS.raw)
        origin = {"checkpoint": str(FLAGS.checkpoint), "raw": FLAGS.raw, "dtype": FLAGS.dtype, "step": sampler.step}
        options = {name: FLAGS[name].value for name in OPTIONS}
        for n, (image, out) in enumerate(pairs):
            run(sampler, image, out, seed=FLAGS.seed + n, guidance=guidance, options=options, origin=origin)
    except (SampleError, VideoError, WeightsError, WorkdirError, ValueError) as error:
        sys.exit(f"sample: {error}")


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run", required=True)
    flags.DEFINE_string("image", None, "image, or folder of images", required=True)
    flags.DEFINE_string("out", None, "video (.mp4 .gif .webp .png), or folder for a folder of images", required=True)
    flags.DEFINE_enum("format", "mp4", ["mp4", "gif", "webp", "png"], "of the videos of a folder")
    flags.DEFINE_integer("steps", 1, "1: one forward pass; more: Euler steps", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the first image; the following ones count up")
    flags.DEFINE_integer("num_frames", None, "default: the model's clip length", lower_bound=1)
    flags.DEFINE_integer("height", None, "default: the image's, in whole latent cells", lower_bound=1)
    flags.DEFINE_integer("width", None, "default: the image's, in whole latent cells", lower_bound=1)
    flags.DEFINE_float("fps", 7, "frame rate the model is told (less one) and the video is written with")
    flags.DEFINE_float("motion_bucket_id", 127, "amount of motion the model is told")
    flags.DEFINE_float("noise_aug_strength", 0.02, "deviation of the noise on the condition image, pixels in [-1, 1]")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_string("dtype", "float32", "compute and parameter dtype of the UNet")
    flags.DEFINE_bool("raw", False, "the trained weights instead of their moving average (workdirs only)")


if __name__ == "__main__":
    _define_flags()
    app.run(main)

"""Makes videos from images.

    python -m sfv_jax.sample --checkpoint runs/sfv --image in.png --out out.mp4

`--checkpoint` is a model folder or the workdir of a training run. `--image` may be a folder: every image in it becomes
a video in the folder `--out`, up to `--batch_size` images of one size at a time. The suffix selects the format: .mp4,
.gif, .webp, or .png for a strip of frames. A .json file next to each video records everything needed to make it again.
"""

from pathlib import Path

from absl import flags

from sfv_jax import choices
from sfv_jax.runtime import commands

FLAGS = flags.FLAGS


def main() -> None:
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.sharding import first_devices
    from sfv_jax.sampling.files import OPTIONS, batches, jobs, run
    from sfv_jax.sampling.sampler import Sampler

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    pairs = jobs(Path(FLAGS.image), Path(FLAGS.out), f".{FLAGS.format}")
    options = commands.values(*OPTIONS)
    options["guidance"] = commands.numbers("guidance", FLAGS.guidance)
    mesh = first_devices(commands.numbers("mesh", FLAGS.mesh))
    load = commands.values("dtype", "vae_dtype", "decode_pixels", "raw", "check_finite")
    sampler = Sampler.load(FLAGS.checkpoint, mesh=mesh, **load)
    origin = {"checkpoint": str(FLAGS.checkpoint), "step": sampler.step, "mesh": FLAGS.mesh} | load
    for batch, size in batches(sampler, pairs, options, FLAGS.batch_size):
        run(sampler, batch, size, seed=FLAGS.seed, options=options, origin=origin, timed=FLAGS.times)


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run", required=True)
    flags.DEFINE_string("image", None, "image, or folder of images", required=True)
    flags.DEFINE_string("out", None, "video (.mp4 .gif .webp .png), or folder for a folder of images", required=True)
    flags.DEFINE_enum("format", "mp4", choices.VIDEO_FORMATS, "format of the videos of a folder")
    flags.DEFINE_integer("steps", 1, "calls of the UNet; 1: one forward pass", lower_bound=1)
    flags.DEFINE_enum(
        "sampler",
        "euler",
        choices.SAMPLERS,
        "euler: for SVD, any number of steps; sfv: up to 3 steps at the training levels of an SF-V generator with fresh"
        " noise in between; sfv_euler: the same without it; animatelcm: up to 40 steps with fresh noise in between",
    )
    flags.DEFINE_integer("seed", 0, "seed of the first image; seeds of the following ones count up")
    flags.DEFINE_integer("num_frames", None, "frames per video; default: the clip length of the model", lower_bound=1)
    flags.DEFINE_integer("height", None, "pixels; default: height of the image in whole latent cells", lower_bound=1)
    flags.DEFINE_integer("width", None, "pixels; default: width of the image in whole latent cells", lower_bound=1)
    flags.DEFINE_float("fps", 7, "frame rate of the video; the condition of the model is fps - 1")
    flags.DEFINE_float("motion_bucket_id", 127, "condition of the model on the amount of motion")
    flags.DEFINE_float("noise_aug_strength", 0.02, "standard deviation of noise on the image, pixels in [-1, 1]")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_enum("dtype", "float32", choices.DTYPES, "dtype of the UNet's parameters and computations")
    flags.DEFINE_enum("vae_dtype", "float32", choices.DTYPES, "compute dtype of the VAE's decoder")
    flags.DEFINE_integer(
        "decode_chunk_size",
        None,
        "frames decoded at a time; default: all; smaller chunks need less memory and flicker at their borders",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "decode_pixels",
        None,
        "pixels, over all frames, that a device decodes at a time, 0 for all; the frames are the same; default: chosen"
        " from device memory",
        lower_bound=0,
    )
    flags.DEFINE_integer("batch_size", 1, "images of a folder sampled at a time", lower_bound=1)
    flags.DEFINE_list("mesh", None, "data,fsdp[,spatial]: devices that share batch, batch and parameters, or rows")
    flags.DEFINE_bool("times", False, "print and record the seconds of each stage (the first call compiles)")
    flags.DEFINE_bool("check_finite", True, "stop at NaN or infinity and name the stage")
    flags.DEFINE_bool("raw", False, "use the trained weights instead of their moving average (workdirs only)")
    commands.define_compiler_flags()


if __name__ == "__main__":
    commands.run(main, define_flags)

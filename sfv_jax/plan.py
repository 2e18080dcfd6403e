"""What a job would cost, before anything is rented.

    python -m sfv_jax.plan --config configs/sfv.py --target v5e:4x8 --config.mesh.fsdp=32
    python -m sfv_jax.plan --config configs/sfv.py --target h200:8 --what sample --json plan.json --picture plan.png

Compiles the real programs (the train step of a config; the stages of sampling or of preparing a cache) for accelerators
that need not be there, and prints memory, FLOPs, collectives and a lower bound of the time. `--fit` looks for settings
that make a job fit. Needs `pip install 'sfv_jax[plan-tpu]'` or `[plan-gpu]`; `--target cpu:N` needs nothing.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sfv_jax import config as configs
from sfv_jax import programs, report, targets
from sfv_jax.config import ConfigError
from sfv_jax.cost import Cost, measure, planner_rss
from sfv_jax.models.networks import DTYPES
from sfv_jax.models.vae import VAEConfig
from sfv_jax.runtime import compilation
from sfv_jax.runtime.files import replacing
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.targets import GIB, Target, TargetError
from sfv_jax.weights.folders import WeightsError

QUICK = -1.0  # compile effort for TPUs where none is asked for: about ten times quicker
DECODING = ("decode_chunk_size", "decode_pixels")
WHAT = {"train": (448, 768), "sample": (576, 1024), "prepare": (448, 768)}  # and the default height, width


class PlanError(ValueError):
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
    except ValueError as error:
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


FLAGS = flags.FLAGS


def write(result: dict) -> None:
    """The files that were asked for."""
    if FLAGS.json:
        with replacing(Path(FLAGS.json)) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
    if FLAGS.picture:
        report.picture(result, Path(FLAGS.picture))


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        if FLAGS.what not in WHAT:
            raise PlanError(f"--what={FLAGS.what}: choose one of {', '.join(WHAT)}")
        for name in ("dtype", "vae_dtype"):
            if FLAGS[name].value not in DTYPES:
                raise PlanError(f"--{name}={FLAGS[name].value}: choose one of {', '.join(DTYPES)}")
        if not 0 < FLAGS.efficiency <= 1:
            raise PlanError(f"--efficiency={FLAGS.efficiency}: a share above 0, at most 1")
        target = targets.parse(FLAGS.target)
        targets.prepare(target)
        compilation.set_up(runs=False)
        if FLAGS.compile_effort is None and target.chip.platform == "tpu":
            jax.config.update("jax_exec_time_optimization_effort", QUICK)
        size = (FLAGS.height or WHAT[FLAGS.what][0], FLAGS.width or WHAT[FLAGS.what][1])
        names = ("batch_size", "memory_gib", "efficiency", "steps", "dtype", "vae_dtype", *DECODING)
        options = {name: FLAGS[name].value for name in names} | {"hlo": Path(FLAGS.hlo) if FLAGS.hlo else None}
        result = plan(FLAGS.config, target, FLAGS.what, size, options, say=lambda text: print(text, file=sys.stderr))
        write(result)
        print(report.text(result))
        if FLAGS.fit and not result["fits"]:
            print("settings that may make it fit, each on top of those before:")
            if found := fit(FLAGS.config, target, FLAGS.what, size, options, say=lambda text: print(text, flush=True)):
                write(result := found)
                print(report.text(found))
            else:
                print("none of these settings makes it fit")
    except (ConfigError, PlanError, TargetError, WeightsError) as error:
        sys.exit(f"plan: {error}")
    sys.exit(0 if result["fits"] else 1)


def _define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "configs/X.py or configs/X.py:tiny", lock_config=True)
    flags.DEFINE_string("target", None, targets.known())
    flags.DEFINE_string("what", "train", "train, sample or prepare")
    flags.DEFINE_bool("fit", False, "when it does not fit, try settings that may make it fit")
    flags.DEFINE_string("json", None, "file for the plan as JSON")
    flags.DEFINE_string("picture", None, "file for a picture of the memory (.png)")
    flags.DEFINE_string("hlo", None, "folder for the text of the compiled programs")
    flags.DEFINE_integer("height", None, "pixels; default 448 (train, prepare), 576 (sample)", lower_bound=1)
    flags.DEFINE_integer("width", None, "pixels; default 768 (train, prepare), 1024 (sample)", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "sample, prepare: videos at a time; default one per chip", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "sample: calls of the UNet", lower_bound=1)
    flags.DEFINE_string("dtype", "bfloat16", "sample: dtype of the UNet")
    flags.DEFINE_string("vae_dtype", "bfloat16", "sample: compute dtype of the VAE's decoder")
    flags.DEFINE_integer("decode_chunk_size", None, "sample: frames decoded at a time", lower_bound=1)
    flags.DEFINE_integer("decode_pixels", None, "sample: pixels decoded at a time on a device; 0: all", lower_bound=0)
    flags.DEFINE_float("memory_gib", None, "memory of a chip, instead of the target's", lower_bound=0)
    flags.DEFINE_float("efficiency", 0.6, "share of the lower bound's speed that a run is assumed to reach")
    flags.mark_flags_as_required(["config", "target"])
    compilation.define_flags()


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=configs.parse_flags)

"""Train a model.

    python -m sfv_jax.train --config configs/sfv.py --workdir runs/sfv --config.init=models/svd --config.data.path=cache

Run the same command again to continue after an interruption. `--workdir` receives `config.json`, `checkpoints/`,
`metrics.jsonl`, `tensorboard/` and `samples/`. Any field can be set with `--config.field=value`; see sfv_jax/config.py.

Several processes (hosts) run the same command with `--coordinator=HOST:PORT --num_processes=N --process_id=I`; SLURM
and TPU pods need no flags; launch/ has scripts. The workdir must be on a disk they share.
"""

import errno
import os
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sfv_jax import config as configs
from sfv_jax.alarms import TrainingStopped
from sfv_jax.checkpoints.base import Base, describe_run, load_generator
from sfv_jax.checkpoints.model_folder import encoders_identity, read_model
from sfv_jax.checkpoints.run import Checkpoints, WorkdirError, claim_workdir, flat
from sfv_jax.config import ConfigError
from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import encoders_of, latent_source, make_loader, world_source
from sfv_jax.journal import Journal
from sfv_jax.methods import METHODS
from sfv_jax.metrics import MetricWriter
from sfv_jax.models.networks import Networks
from sfv_jax.pictures import Pictures
from sfv_jax.programs import jit_train_step, step_flops
from sfv_jax.runtime import compilation
from sfv_jax.runtime.device import peak_flops
from sfv_jax.runtime.processes import ProcessError, agree, join, once
from sfv_jax.runtime.progress import ProgressReport
from sfv_jax.runtime.sharding import local_rows, make_mesh, on_mesh, param_shardings, put_batch, with_shardings
from sfv_jax.runtime.stopping import StopRequest
from sfv_jax.speed import Clock, Trace
from sfv_jax.weights.folders import WeightsError


def load_base(config: ConfigDict, mesh: jax.sharding.Mesh) -> Base:
    """Where training starts: `config.init`, or random weights on the procedural world's codec; placed on `mesh`.

    Raises:
      ConfigError: if `config.unet` would change parameters that `config.init` brings.
    """
    if not config.init:
        unet, codec = configs.unet_of(config), configs.patch_codec_of(config)
        if config.data.source != "world":
            raise ConfigError("config.init is empty: name a model folder (python -m sfv_jax.convert makes one)")
        networks = Networks(unet)
        place = param_shardings(mesh, networks.abstract["generator"])
        init = networks.init_generator
        if mesh.size > 1:  # compiling this takes longer than running it, so only where there is something to place
            init = jax.jit(init, static_argnums=0, out_shardings=place)
        params = init(config.seed)
        return Base(unet, params, codec, None, None)
    raw = config.init_weights == "generator"
    base = load_generator(config.init, raw=raw, place=lambda abstract: param_shardings(mesh, abstract))
    return replace(base, unet=configs.same_unet(base.unet, config))


def open_source(config: ConfigDict, base: Base, split: str):
    """Random-access examples of `config.data`.

    Raises:
      ConfigError: if latents and UNet do not fit, or the source is unknown.
    """
    data = config.data
    if data.source == "world":
        source = world_source(configs.world_of(config), split, data.world_size, base.codec)
    elif data.source == "latents":
        source = latent_source(data.path, split, base.codec.scaling_factor)
        check_encoders(config, base)
    else:
        raise ConfigError(f"config.data.source={data.source!r}: choose 'latents' or 'world'")
    example = source[0]
    channels = (example["latents"].shape[-1], example["image_embed"].shape[-1])
    expected = (base.unet.out_channels, base.unet.cross_attention_dim)
    if channels != expected:
        advice = "prepare the cache with that model" if data.source == "latents" else "change config.unet"
        raise ConfigError(
            f"config.data: latents have {channels[0]} channels and image embeddings {channels[1]} numbers, the UNet of "
            f"config.init={config.init!r} wants {expected[0]} and {expected[1]}: {advice}"
        )
    return source


def check_encoders(config: ConfigDict, base: Base) -> None:
    """Raises ConfigError if the cache was made by another VAE or CLIP tower than those the model will be sampled with.

    Nothing is checked where either side is not recorded, or with `config.data.any_encoders`.
    """
    if base.model is None or config.data.any_encoders:
        return
    theirs, ours = encoders_of(config.data.path), encoders_identity(read_model(base.model)[1])
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"config.data.path={config.data.path} was made with other encoders ({theirs[:12]}...) than those of "
            f"{base.model} ({ours[:12]}...): prepare it with that model, or set config.data.any_encoders=True if they "
            "only differ in file format"
        )


def train(config: ConfigDict, workdir: Path) -> dict:
    """Trains until `config.steps`; returns the final state (nested dict of arrays)."""
    agree(flat(config.to_dict()))
    if config.method not in METHODS:
        raise ConfigError(f"config.method={config.method!r}: choose one of {', '.join(METHODS)}")
    method, chief = METHODS[config.method], jax.process_index() == 0

    # ---- networks, state, shardings: shapes first ----
    try:
        mesh = make_mesh(**config.mesh)
        rows = local_rows(mesh, config.batch_size, config.accumulation_steps)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error
    base = load_base(config, mesh)
    source = open_source(config, base, config.data.split)
    try:
        networks = method.make_networks(base.unet, config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config: {error}") from error

    def init(params):
        return method.init_state(networks, config, params)

    abstract = jax.eval_shape(init, base.params)
    shardings = param_shardings(mesh, abstract)
    params, base = base.params, replace(base, params=None)  # the state replaces them
    try:
        loader = make_loader(source, global_batch_size=config.batch_size, seed=config.seed, rows=rows)
    except ValueError as error:
        raise ConfigError(f"config.batch_size={config.batch_size}: {error}") from error

    def claim():  # after all that can refuse the config
        claim_workdir(workdir, config.to_dict())
        describe_run(workdir, base.unet, base.codec if base.model is None else None, base.model)

    once(claim)
    with ExitStack() as stack:  # on the way out, saves under way are waited for, whatever happened
        checkpoints = stack.enter_context(
            closing(Checkpoints(workdir, config.keep_checkpoints, config.keep_every, config.to_dict()))
        )
        writer = stack.enter_context(closing(MetricWriter(workdir, chief, config.wandb_project, config.to_dict())))
        restored = checkpoints.restore(with_shardings(abstract[0], shardings[0]))
        latest = restored[0] if restored else None
        writer.resume(latest or 0)
        if restored is None:
            state, frozen = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
        else:
            frozen = jax.jit(lambda params: init(params)[1], out_shardings=shardings[1])(params)
            _, state, position = restored
            loader.set_state(position)
            if chief:
                print(f"continuing {workdir} at step {latest}" if latest < config.steps else f"{workdir} is finished")
        del params

        step_fn = jit_train_step(method, networks, config, mesh, shardings)
        pictures = None
        if config.sample_every and (latest or 0) < config.steps:
            held_out = open_source(config, base, "heldout") if config.data.source == "world" else source
            pictures = Pictures(config, base, held_out, workdir, writer, mesh)
        report = stack.enter_context(closing(ProgressReport(config.steps, latest or 0, chief, config.method)))
        flops = None  # on CPU nobody asks
        if jax.default_backend() != "cpu":
            flops = step_flops(config, base.unet, source[0]) / jax.device_count()
        clock = Clock(report.first, flops, peak_flops(jax.devices()[0].device_kind))
        out = Outputs(
            Journal(config, clock, writer, report, checkpoints.latest),
            pictures,
            checkpoints,
            stack.enter_context(closing(Trace(workdir / "profile", config.profile_start, config.profile_steps))),
        )
        return loop(
            config,
            on_mesh(mesh, lambda state, batch: step_fn(state, frozen, batch)),
            state,
            loader,
            lambda batch: put_batch(mesh, batch),
            out,
            stack.enter_context(StopRequest()),
        )


@dataclass(frozen=True)
class Outputs:
    """What a run fills besides its state."""

    journal: Journal
    pictures: Pictures | None
    checkpoints: Checkpoints
    trace: Trace


def loop(config, step_fn, state, loader, put, out: Outputs, stop: StopRequest) -> dict:
    """Steps from where the report starts to `config.steps`, or until asked to `stop`; returns the last state.

    Args:
      step_fn: `(state, batch) -> (state, metrics)`.
      put: from a batch of `loader` to one on devices.
    Raises:
      TrainingStopped: if something went wrong; checkpoints are sound.
    """
    journal, report = out.journal, out.journal.report
    for step in range(report.first + 1, config.steps + 1):
        with journal.clock.measure("data_wait"):
            batch = put(next(loader))
        out.trace.at(step, state)
        with journal.clock.measure("device"):
            state, metrics = step_fn(state, batch)
        journal.add(metrics)
        report.advance(step)
        stopped = step < config.steps and stop.asked(step)
        last = stopped or step == config.steps
        if step % config.log_every == 0 or last:
            journal.end_interval()
        if step % config.checkpoint_every == 0 or last:
            # A run resumed here writes no line for the steps before, and nothing bad may be saved.
            journal.flush(everything=True)
            out.checkpoints.save(step, state, loader.get_state())
        if out.pictures and (step % config.sample_every == 0 or last):
            out.pictures.draw(state["generator"], state["ema"], step)
            journal.clock.pause()
        if stopped:
            report.print(f"asked to stop: saved step {step}; run the same command again to continue")
            break
    return state


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)  # orbax reports every rename
    compilation.set_up()
    try:
        join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        train(FLAGS.config, Path(FLAGS.workdir))
    except (ConfigError, LatentError, ProcessError, TrainingStopped, WeightsError, WorkdirError) as error:
        sys.exit(f"train: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"train: {error}: make room, then run the same command again to continue from the last checkpoint")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/X.py or configs/X.py:tiny", lock_config=True)
    flags.DEFINE_string("workdir", None, "folder of the run, made if absent")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto")
    flags.DEFINE_integer("num_processes", None, "processes of this run, with --coordinator")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0, with --coordinator")
    flags.mark_flags_as_required(["config", "workdir"])
    compilation.define_flags()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    app.run(main, flags_parser=configs.parse_flags)

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
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from einops import rearrange
from ml_collections import ConfigDict, config_flags

from sfv_jax import config as configs
from sfv_jax.checkpoint import Checkpoints, WorkdirError, claim_workdir
from sfv_jax.config import ConfigError
from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import encoders_of, latent_source, make_loader, world_source
from sfv_jax.data.video import write_video
from sfv_jax.methods import METHODS
from sfv_jax.metrics import MetricWriter, ProgressReport
from sfv_jax.processes import ProcessError, join, once, whole
from sfv_jax.runs import Base, describe_run, load_generator
from sfv_jax.sampler import Sampler
from sfv_jax.sharding import (
    batch_sharding,
    local_rows,
    make_mesh,
    on_mesh,
    param_shardings,
    put_batch,
    replicated_sharding,
    with_shardings,
)
from sfv_jax.state import Networks
from sfv_jax.stopping import StopRequest
from sfv_jax.weights.checkpoint import encoders_identity, read_model
from sfv_jax.weights.folders import WeightsError

SAME_PARAMETERS = ("remat", "temporal_conv", "attention_kernel", "num_frames")  # may change with `init` given


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
    wrong = sorted(set(config.unet) - set(SAME_PARAMETERS))
    if wrong and config.data.source != "world":
        raise ConfigError(f"config.unet.{wrong[0]} cannot change: config.init={config.init} decides it")
    raw = config.init_weights == "generator"
    base = load_generator(config.init, raw=raw, place=lambda abstract: param_shardings(mesh, abstract))
    return replace(base, unet=replace(base.unet, **{k: config.unet[k] for k in SAME_PARAMETERS if k in config.unet}))


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


class Pictures:
    """Samples from fixed conditions, drawn now and then: rows are conditions, columns frames, the truth on top."""

    def __init__(self, config: ConfigDict, base: Base, source, workdir: Path, mesh: jax.sharding.Mesh):
        examples = [source[n] for n in range(min(config.sample_count, len(source)))]
        batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
        self.condition = {k: batch[k] for k in ("cond_latent", "image_embed", "ids")}
        self.sampler = Sampler(base.unet, None, base.codec)
        self.generate = on_mesh(mesh, self.sampler.latents)
        self.noise = np.asarray(jax.random.normal(jax.random.key(config.seed), batch["latents"].shape))
        self.steps = config.teacher.sample_steps if config.method == "teacher" else 1
        self.truth = np.asarray(base.codec.decode(batch["latents"]))
        self.folder = workdir / "samples"

    def draw(self, params, step: int) -> np.ndarray | None:
        """Writes `samples/STEP.png` (a strip of all frames) and `.gif`; returns the strip.

        Every process takes part in computing; process 0 writes, the others return None.
        """
        self.sampler.params = params
        latents = whole(self.generate(self.condition, self.noise, steps=self.steps))
        if jax.process_index() > 0:
            return None
        fakes = np.asarray(self.sampler.codec.decode(latents))
        frames = rearrange(np.concatenate([self.truth, fakes], axis=2), "b t h w c -> t h (b w) c")
        frames = enlarge(frames, 2)
        self.folder.mkdir(exist_ok=True)
        write_video(self.folder / f"{step:07d}.gif", frames)
        strip = rearrange(np.stack([self.truth, fakes], axis=1), "b n t h w c -> (b n h) (t w) c")
        strip = enlarge(strip[None], 2)
        write_video(self.folder / f"{step:07d}.png", strip)
        return strip[0]


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """`[t, h, w, 3]` with every pixel repeated when the frames are small (below 256 pixels), else as they are."""
    if frames.shape[1] >= 256:
        return frames
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def train(config: ConfigDict, workdir: Path) -> dict:
    """Trains until `config.steps`; returns the final state (nested dict of arrays)."""
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
        writer = stack.enter_context(closing(MetricWriter(workdir, chief)))
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

        step_fn = jax.jit(
            method.make_train_step(networks, config),
            in_shardings=(*shardings, batch_sharding(mesh)),
            out_shardings=(shardings[0], replicated_sharding(mesh)),
            donate_argnums=0,
        )
        pictures = None
        if config.sample_every and (latest or 0) < config.steps:
            held_out = open_source(config, base, "heldout") if config.data.source == "world" else source
            pictures = Pictures(config, base, held_out, workdir, mesh)
        report = stack.enter_context(closing(ProgressReport(config.steps, latest or 0, chief, config.method)))
        stop = stack.enter_context(StopRequest())
        batches = (put_batch(mesh, batch) for batch in loader)
        return loop(
            config,
            on_mesh(mesh, lambda state, batch: step_fn(state, frozen, batch)),
            state,
            batches,
            loader,
            pictures,
            checkpoints,
            writer,
            report,
            stop,
        )


def loop(config, step_fn, state, batches, loader, pictures, checkpoints, writer, report, stop) -> dict:
    """Steps from where `report` starts to `config.steps`, or until asked to `stop`; returns the last state."""
    pending, interval, clock = None, [], Clock(report.first)
    for step in range(report.first + 1, config.steps + 1):
        with clock.waiting():
            batch = next(batches)
        state, metrics = step_fn(state, batch)
        interval.append(metrics)
        report.advance(step)
        stopped = step < config.steps and stop.asked(step)
        last = stopped or step == config.steps
        if step % config.log_every == 0 or last:
            # The device is never waited for: what is fetched now was finished an interval ago.
            log(writer, report, clock, pending)
            pending, interval = (step, interval), []
        if step % config.checkpoint_every == 0 or last:
            # A run resumed here writes no line for the steps before; saving waits for the device anyway.
            log(writer, report, clock, pending)
            pending = None
            checkpoints.save(step, state, loader.get_state())
        if pictures and (step % config.sample_every == 0 or last):
            strip = pictures.draw(state["ema"], step)
            if strip is not None:
                writer.image(step, "samples", strip)
            clock.pause()
        if stopped:
            report.print(f"asked to stop: saved step {step}; run the same command again to continue")
            break
    return state


class Clock:
    """Step time and the part of it spent waiting for data, between calls of `lap`."""

    def __init__(self, step: int):
        self.step, self.began, self.data = step, None, 0.0

    def waiting(self):
        """Context manager around the wait for a batch."""
        return _Stopwatch(self)

    def pause(self) -> None:
        """Leaves what happened since the last lap out of the next one."""
        self.began = None

    def lap(self, step: int) -> dict:
        """Seconds per step since the last lap; empty for the first, which compiled, and after a pause."""
        now, times = time.monotonic(), {}
        if self.began is not None and step > self.step:
            steps = step - self.step
            times = {"time/step": (now - self.began) / steps, "time/data_wait": self.data / steps}
        self.step, self.began, self.data = step, now, 0.0
        return times


class _Stopwatch:
    def __init__(self, clock: Clock):
        self.clock = clock

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, *_):
        self.clock.data += time.monotonic() - self.start


def log(writer: MetricWriter, report: ProgressReport, clock: Clock, pending: tuple | None) -> None:
    """Writes the means over an interval, `pending (last step, metrics of every step)`, with the time per step."""
    if pending is None:
        return
    step, metrics = pending
    metrics = jax.device_get(metrics)
    values = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]} | clock.lap(step)
    writer.scalars(step, values)
    losses = "  ".join(f"{k.removeprefix('loss/')} {v:.4g}" for k, v in values.items() if k.startswith("loss/"))
    speed = f"{values['time/step']:.3f} s/step  " if "time/step" in values else ""
    report.note(step, speed + losses)


FLAGS = flags.FLAGS


def main(_):
    logging.set_verbosity(logging.WARNING)  # orbax reports every rename
    try:
        join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        train(FLAGS.config, Path(FLAGS.workdir))
    except (ConfigError, LatentError, ProcessError, WeightsError, WorkdirError) as error:
        sys.exit(f"train: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"train: {error}: make room, then run the same command again to continue from the last checkpoint")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but one line instead of a traceback for a config field that does not exist."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its KeyError
            error = error.args[0]
        sys.exit("train: no such config field: " + " ".join(str(error.args[0]).split()))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/X.py or configs/X.py:tiny", lock_config=True)
    flags.DEFINE_string("workdir", None, "folder of the run, made if absent")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto")
    flags.DEFINE_integer("num_processes", None, "processes of this run, with --coordinator")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0, with --coordinator")
    flags.mark_flags_as_required(["config", "workdir"])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    app.run(main, flags_parser=parse_flags)

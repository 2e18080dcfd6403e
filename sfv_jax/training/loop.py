"""Training loop, from a config to the last checkpoint."""

from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sfv_jax.checkpoints.run import BadStateError, Checkpoints, claim_workdir, explained, owned, read_config, safe
from sfv_jax.config import ConfigError
from sfv_jax.config_check import check
from sfv_jax.config_records import renewed, settled
from sfv_jax.data.loader import make_loader
from sfv_jax.errors import UserError
from sfv_jax.methods import METHODS
from sfv_jax.models.partitioning import platform
from sfv_jax.runtime.device import peak_flops
from sfv_jax.runtime.plain_config import flat
from sfv_jax.runtime.processes import agree, once
from sfv_jax.runtime.progress import ProgressReport, compiling, say
from sfv_jax.runtime.sharding import local_rows, make_mesh, on_mesh, param_shardings, put_batch, with_shardings
from sfv_jax.runtime.stopping import StopRequest
from sfv_jax.training.clock import Clock, Trace
from sfv_jax.training.inputs import check_memory, load_backbone
from sfv_jax.training.journal import Journal
from sfv_jax.training.metrics import MetricWriter
from sfv_jax.training.previews import Previews
from sfv_jax.training.startup import describe_devices, describe_job
from sfv_jax.training.step import jit_train_step
from sfv_jax.training.subjects import open_subject


def train(config: ConfigDict, workdir: Path) -> dict:
    """Trains until `config.steps`, or continues a run, and returns the last state (nested dict of arrays).

    Raises:
      ConfigError: if the config cannot be run.
      WorkdirError: if `workdir` contains another run, or a checkpoint cannot be written or read.
      LockError: if another process trains in `workdir`.
      ProcessError: if the processes were started with different settings.
      TrainingStopped: if a number is not finite, or an alarm stops the run.
    """
    check(config)
    config = settled(config, platform(), recorded_config(config, workdir))
    agree(flat(config.to_dict()))
    with owned(workdir) as check_owner, explained(workdir):
        return train_owned(config, workdir, check_owner)


def recorded_config(config: ConfigDict, workdir: Path) -> dict | None:
    """Returns the flat fields of the run that `config` continues, in today's form; None if nothing was saved."""
    if not (workdir / "config.json").exists() or not (workdir / "checkpoints").exists():
        return None
    return renewed(flat(read_config(workdir)), flat(config.to_dict()))


def train_owned(config: ConfigDict, workdir: Path, check_owner: Callable[[], None]) -> dict:
    """Trains like `train` in a workdir that this run owns; calls `check_owner` before every save."""
    method, chief = METHODS[config.method], jax.process_index() == 0

    # ---- networks, state, shardings: shapes first ----
    try:
        mesh = make_mesh(**config.mesh)
        rows = local_rows(mesh, config.batch_size, config.accumulation_steps)
    except UserError as error:
        raise ConfigError(f"config: {error}") from error
    say(describe_devices(config, mesh))
    subject = open_subject(config, mesh)
    networks = subject.networks

    def init(params):
        return method.init_state(networks, config, params)

    abstract = jax.eval_shape(init, subject.params)
    shardings = param_shardings(mesh, abstract)
    check_memory("the state of training", abstract, shardings)
    params, subject = subject.params, replace(subject, params={})  # the state replaces them
    try:
        loader = make_loader(
            subject.source,  # of a sequence, grain needs only `len` and `[]`
            global_batch_size=config.batch_size,
            seed=config.seed,
            rows=rows,
        )
    except UserError as error:
        raise ConfigError(f"config.batch_size={config.batch_size}: {error}") from error

    def claim() -> None:  # after all checks of the config
        claim_workdir(workdir, config.to_dict(), renewed)
        subject.describe(workdir)

    once(claim)
    say(describe_job(config, abstract[0], subject.source))
    with ExitStack() as stack:  # its end waits for unfinished checkpoints, also after an error
        stop = stack.enter_context(StopRequest(lambda: safe(workdir)))  # outlives the wait for the last checkpoint
        if jax.process_count() == 1:  # several stop after a step that they agree on
            stop.next = "before the first step: nothing is unsaved"
        checkpoints = stack.enter_context(
            closing(Checkpoints(workdir, config.keep_checkpoints, config.keep_every, config.to_dict()))
        )
        writer = stack.enter_context(closing(MetricWriter(workdir, chief, config.wandb_project, config.to_dict())))
        restored = checkpoints.restore(with_shardings(abstract[0], shardings[0]))
        latest = restored[0] if restored else None
        writer.resume(latest or 0)
        if restored is None:
            with compiling("the first state"):
                state, frozen = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
        else:
            frozen = jax.jit(lambda params: init(params)[1], out_shardings=shardings[1])(params)
            _, state, position = restored
            loader.set_state(position)
            say(f"continuing {workdir} at step {latest}" if latest < config.steps else f"{workdir} is finished")
        del params
        if config.get("backbone_init"):
            frozen["backbone"] = load_backbone(config, networks, shardings[1]["backbone"], mesh)

        step_fn = jit_train_step(method, networks, config, mesh, shardings)
        previews = None
        if config.sample_every and (latest or 0) < config.steps:
            previews = subject.previews(workdir, writer)
        report = stack.enter_context(closing(ProgressReport(config.steps, latest or 0, chief, config.method)))
        flops = None  # not reported on CPU
        if jax.default_backend() != "cpu":
            flops = subject.flops() / jax.device_count()
        clock = Clock(report.first, flops, peak_flops(jax.devices()[0].device_kind))
        out = Outputs(
            Journal(config, clock, writer, report, checkpoints.settled),
            previews,
            checkpoints,
            check_owner,
            stack.enter_context(closing(Trace(workdir / "profile", config.profile_start, config.profile_steps))),
        )
        return loop(
            config,
            on_mesh(mesh, lambda state, batch: step_fn(state, frozen, batch)),
            state,
            loader,
            lambda batch: put_batch(mesh, batch),
            out,
            stop,
        )


@dataclass(frozen=True)
class Outputs:
    """Outputs of a run besides its state."""

    journal: Journal
    previews: Previews | None
    checkpoints: Checkpoints
    check_owner: Callable[[], None]
    trace: Trace

    def save(self, step: int, state: dict, position: dict) -> None:
        """Starts to save `state` after `step` and the `position` of the loader.

        Raises:
          TrainingStopped: if a number of the state is not finite; nothing is saved.
          LockError: if another run has taken the workdir over.
        """
        # A run that resumes here writes no metrics of earlier steps, and only finite numbers may be saved.
        self.journal.flush(everything=True)
        self.check_owner()
        try:
            self.checkpoints.save(step, state, position)
        except BadStateError as error:
            self.journal.stop(step, "nan", str(error))


def loop(config, step_fn, state, loader, put, out: Outputs, stop: StopRequest) -> dict:
    """Trains from the first step of the report to `config.steps`, or until a stop is requested.

    Args:
      config: config of the run.
      step_fn: `(state, batch) -> (state, metrics)`.
      state: the state before the first step; donated.
      loader: iterator over the batches of this process, with `get_state`.
      put: function from a batch of `loader` to a global batch on devices.
      out: outputs of the run.
      stop: requests to stop.

    Returns:
      The last state.

    Raises:
      TrainingStopped: if a number is not finite, or an alarm stops the run; checkpoints remain sound.
    """
    journal, report = out.journal, out.journal.report
    if stop.before():
        report.print("asked to stop before the first step: nothing was changed")
        return state
    drawn = False
    for step in range(report.first + 1, config.steps + 1):
        with journal.clock.measure("data_wait"):
            batch = put(next(loader))
        out.trace.at(step, state)
        first = step == report.first + 1
        stop.next = "after the compilation and one step, then saving" if first else StopRequest.next
        with journal.clock.measure("device"), compiling("the train step") if first else nullcontext():
            state, metrics = step_fn(state, batch)
        if first:  # which is long; later steps never wait for the device
            jax.block_until_ready(metrics)
            say(f"step {step} of {config.steps} is done")
        journal.add(metrics)
        report.advance(step)
        stopped = step < config.steps and stop.asked(step)
        last = stopped or step == config.steps
        if step % config.log_every == 0 or last:
            journal.end_interval()
        if step % config.checkpoint_every == 0 or last:
            out.save(step, state, loader.get_state())
        if stopped:
            out.checkpoints.wait()
            report.print(f"asked to stop: saved step {step}; run the same command again to continue")
            break
        if out.previews and (step % config.sample_every == 0 or last):
            with nullcontext() if drawn else compiling(f"the pictures of samples/, at step {step}"):
                out.previews.draw(state["generator"], state["ema"], step)
            drawn = True
            journal.clock.pause()
    else:
        if report.first < config.steps:
            out.checkpoints.wait()
            report.print(f"finished: saved step {config.steps}")
    return state

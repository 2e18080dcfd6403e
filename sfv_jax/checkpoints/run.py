"""Training checkpoints: state, data position and config of a run, by orbax.

`workdir/config.json` contains the config of the run, `workdir/checkpoints/STEP` everything that is needed to continue.
A checkpoint is committed in one step, so a crash leaves either a whole checkpoint or none. Every array is saved with a
fingerprint, because the storage does not detect a flipped bit in stored numbers; a checkpoint that does not match its
fingerprints is moved away, and the one before is used. Numbers that are not finite are never saved. One process (with
several, process 0) owns a workdir at a time, by `workdir/lock.json`.
"""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sfv_jax.checkpoints.checksums import examine
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import free_name, read_json, to_disk, write_text
from sfv_jax.runtime.locks import Lock
from sfv_jax.runtime.plain_config import flat
from sfv_jax.runtime.processes import once, tell
from sfv_jax.runtime.progress import say

MAY_CHANGE = (
    "steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "sample_every",
    "sample_count",
    "mesh.data",
    "mesh.fsdp",
    "mesh.spatial",
    "alarms.on_alarm",
    "alarms.patience",
    "alarms.min_adv_to_rec",
    "alarms.max_adv_to_rec",
    "alarms.min_live",
    "alarms.max_gap",
    "alarms.min_motion",
    "alarms.max_data_wait",
    "wandb_project",
    "profile_start",
    "profile_steps",
)
DAMAGED = "damaged"  # folder of a workdir for damaged checkpoints
LOCK = "lock.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ATTEMPTS = 20  # to read a checkpoint of a run that goes on
SLICE = 2**16  # bytes; of an array on several devices each writes a part, if that is not smaller


class WorkdirError(UserError):
    """Workdir that cannot be used for this run; the message gives the cause and the remedy."""


class BadStateError(WorkdirError):
    """State with numbers that are not finite, of which nothing was saved; the message names the arrays."""


@contextmanager
def owned(workdir: Path) -> Generator[Callable[[], None], None, None]:
    """Owns `workdir`, which is created if absent; all processes of a run must enter.

    Yields:
      Function that checks that the workdir is still this run's; all processes must call it.

    Raises:
      LockError: if another run has it (in process 0; `ProcessError` in the others).
      WorkdirError: if it cannot be written.
    """
    lock = Lock(workdir / LOCK, str(workdir))
    new = not workdir.exists()

    def take() -> None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock.__enter__()
        except OSError as error:
            cause = error.strerror or str(error)
            if workdir.is_symlink() and not workdir.exists():
                cause = f"a symbolic link to {workdir.readlink()}, which does not exist"
            elif workdir.exists() and not workdir.is_dir():
                cause = "not a folder"
            message = f"{workdir} cannot be used as workdir: {cause}; name a folder that can be written"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = _not_written(workdir, LOCK, cause)
            raise WorkdirError(message) from error

    once(take)
    try:
        yield lambda: once(lock.check)
    finally:
        if jax.process_index() == 0:
            lock.__exit__()
            if new:  # and nothing was put there, because the config cannot be run
                with suppress(OSError):
                    workdir.rmdir()


@contextmanager
def explained(workdir: Path) -> Generator[None, None, None]:
    """Turns an error of the disk, of whatever file of the workdir, into one that names what is safe.

    Raises:
      WorkdirError: in place of an `OSError` of a full disk, or of a file of the workdir.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and not Path(str(error.filename)).is_relative_to(workdir):
            raise
        raise WorkdirError(
            _not_written(workdir, str(error.filename or "a file"), error.strerror or str(error))
        ) from error


def _not_written(workdir: Path, what: str, cause: str) -> str:
    return (
        f"{workdir}: {what} could not be written ({cause}); {safe(workdir)}. "
        "Make room or repair the disk, then run the same command again"
    )


def claim_workdir(workdir: Path, config: dict, renew: Callable[[dict, dict], dict] = lambda old, new: old) -> None:
    """Records `config` in `workdir`, or checks that it equals the recorded one.

    Fields of `MAY_CHANGE` (length, reporting and mesh) may differ between runs of the same workdir, and any field as
    long as nothing was saved, which is said.

    Args:
      workdir: the workdir.
      config: config of the run (JSON).
      renew: function from the recorded flat fields and those of `config` to the recorded ones in today's form.

    Raises:
      WorkdirError: if any other field differs; lists all of them.
    """
    path, text = workdir / "config.json", json.dumps(config, indent=1)
    if path.exists():
        old, new = flat(read_config(workdir)), flat(json.loads(text))  # JSON turns tuples into lists
        old = renew(old, new)
        names = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
        lines = [f"  {k}: {old.get(k, '(absent)')!r} there, {new.get(k, '(absent)')!r} now" for k in names]
        if names and not (_committed((workdir / "checkpoints").resolve()) or (workdir / DAMAGED).exists()):
            say("\n".join([f"{workdir} has no checkpoint yet, so the changed config replaces the old one:", *lines]))
        elif names:
            raise WorkdirError(
                f"{workdir} holds a run of another config; use another --workdir, or restore these fields:\n"
                + "\n".join(lines)
            )
    write_text(path, text)


def read_config(workdir: Path) -> dict:
    """Reads `workdir/config.json`.

    Raises:
      FileError: if it is missing or damaged.
    """
    copies = "checkpoints/STEP/config/metadata has a copy"
    return read_json(workdir / "config.json", f"restore it ({copies}), or delete it and repeat the command of the run")


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for logs of orbax on errors that it also raises, on waiting, and on `write_small_arrays_whole`."""
    expected = ("Waiting for previous save", "Type handler registry type")
    known = record.exc_info or any(text in record.getMessage() for text in expected)
    return not (known and "orbax" in record.pathname)


def write_small_arrays_whole() -> None:
    """Makes orbax write arrays whose part per device has fewer than `SLICE` bytes from one of their devices.

    By default it cuts all of them, by a program for each shape, and stores every part: for a small network on eight
    devices that takes four times as long and three times the space.
    """
    store = getattr(ocp.type_handlers.get_type_handler(jax.Array), "_array_metadata_store", None)
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE, array_metadata_store=store)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class Checkpoints:
    """Asynchronous saves of `{state, data, config}` under `workdir/checkpoints`.

    Args:
      workdir: the workdir of the run.
      keep: number of newest checkpoints that are kept.
      keep_every: checkpoints whose step is a multiple of this are kept permanently; 0: none.
      config: config of the run (JSON), saved to document a checkpoint found without its workdir; never read.
    """

    def __init__(self, workdir: Path, keep: int = 3, keep_every: int = 0, config: dict | None = None):
        logging.getLogger("absl").addFilter(_is_news)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self.workdir, self.folder, self.config = workdir, (workdir / "checkpoints").resolve(), config or {}
        self.step: int | None = None  # of the last save
        write_small_arrays_whole()
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the newest step whose checkpoint is whole and on the disk, or None."""
        return max(_committed(self.folder), default=None)

    def settled(self) -> int | None:
        """Returns `latest()` after the end of a save that is under way, however that ends."""
        with suppress(WorkdirError):
            self.wait()
        return self.latest()

    def save(self, step: int, state: dict, data: dict) -> None:
        """Starts to save a checkpoint and returns before it is written.

        Args:
          step: number of finished steps.
          state: tree of arrays.
          data: position of the loader (JSON).

        Raises:
          BadStateError: if a number of the state is not finite.
          WorkdirError: if this or the previous checkpoint cannot be written, for example because the disk is full.
        """
        prints, bad = examine(state)
        if bad:
            others = f" (and {len(bad) - 1} more arrays of the state)" if len(bad) > 1 else ""
            raise BadStateError(f"not finite: {bad[0]}{others}")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            fingerprints=ocp.args.JsonSave(prints),
            config=ocp.args.JsonSave(self.config),
        )
        self._guard(self.manager.wait_until_finished)  # an error here is of the checkpoint before
        self.step = step
        self._guard(lambda: self.manager.save(step, args=items))

    def wait(self) -> None:
        """Waits until all checkpoints are on the disk.

        Raises:
          WorkdirError: if the last one could not be written.
        """
        self._guard(self._finish)

    def _finish(self) -> None:
        self.manager.wait_until_finished()
        newest = self.latest()
        if jax.process_index() == 0 and newest is not None:  # orbax leaves small files to the system
            for path in (self.folder / str(newest)).rglob("*"):
                to_disk(path)
            to_disk(self.folder)

    def restore(self, abstract_state: dict) -> tuple[int, dict, dict] | None:
        """Returns `(step, state, data)` of the newest sound checkpoint, None if no checkpoint exists.

        Arrays have the shapes, dtypes and shardings of `abstract_state`. Newer, damaged checkpoints are reported and
        moved to `workdir/damaged`.

        Raises:
          WorkdirError: if there are checkpoints but none is sound.
        """

        def read(step: int) -> tuple[tuple[dict, dict], dict, dict]:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state),
                data=ocp.args.JsonRestore(),
                fingerprints=ocp.args.JsonRestore(),
            )
            restored = self.manager.restore(step, args=items)
            return (restored["state"], restored["data"]), restored["state"], restored["fingerprints"]

        steps = self.manager.all_steps()
        if not steps:
            return None
        step, (state, data) = newest_sound(self.workdir, lambda: list(steps), read)
        if newer := sorted((s for s in steps if s > step), reverse=True):
            self._set_aside(newer)
        return step, state, data

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = free_name(self.workdir / DAMAGED / str(step))
                target.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self.manager.reload()

    def close(self) -> None:
        """Waits until all checkpoints are on the disk.

        Raises:
          WorkdirError: if the last one could not be written.
        """
        try:
            self.wait()
        finally:
            self.manager.close()

    def _guard(self, call: Callable) -> None:
        try:
            call()
        except Exception as error:  # for a full disk OSError, tensorstore's ValueError or one of orbax's own
            raise WorkdirError(_not_written(self.workdir, f"checkpoint {self.step}", _cause(error))) from error


def _cause(error: Exception) -> str:
    """Returns the cause of a failed write: that of the system, if the error has one somewhere in its text."""
    causes = [os.strerror(number) for number in FULL]
    return next((cause for cause in causes if cause in str(error)), _first_line(error))


def safe(workdir: Path) -> str:
    """Returns a clause on the newest checkpoint of a run that is on the disk."""
    last = max(_committed((workdir / "checkpoints").resolve()), default=None)
    return f"the checkpoint of step {last} is intact" if last is not None else "there is no checkpoint yet"


def newest_sound(
    workdir: Path, listed: Callable[[], Sequence[int]], read: Callable[[int], tuple[Any, Any, dict]]
) -> tuple[int, Any]:
    """Finds the newest checkpoint that can be read and matches its fingerprints; reports damaged ones on stderr.

    A run may write checkpoints meanwhile and remove older ones. So a checkpoint that cannot be read is damaged only if
    it is still there and the newest.

    Args:
      workdir: the workdir, for messages.
      listed: function that returns the steps of the checkpoints that are there now.
      read: function from a step to `(content, arrays, fingerprints)` of its checkpoint.

    Returns:
      step: the step.
      content: the first result of `read(step)`.

    Raises:
      WorkdirError: if no checkpoint is sound, or each is removed before it is read.
    """
    damaged: list[int] = []
    for _ in range(ATTEMPTS):
        steps = _of_process_0(lambda: sorted(set(listed()) - set(damaged), reverse=True))
        if not steps:
            break
        content, problem = None, ""
        try:
            content, arrays, recorded = read(steps[0])
            problem = _difference(arrays, recorded)
            del arrays
        except Exception as error:  # broken files make orbax, tensorstore and json raise errors of many kinds
            problem = _first_line(error)
        if _everywhere(not problem):
            return steps[0], content
        if _of_process_0(lambda: sorted(set(listed()) - set(damaged), reverse=True)) != steps:
            continue  # replaced by a newer one
        print(f"{workdir}: checkpoint {steps[0]} is damaged ({problem or 'in another process'})", file=sys.stderr)
        damaged.append(steps[0])
    else:
        raise WorkdirError(
            f"{workdir}: its run replaced {ATTEMPTS} checkpoints while they were read: repeat this when it pauses, or "
            "continue the run with a larger --config.keep_checkpoints or --config.checkpoint_every"
        )
    raise WorkdirError(
        f"{workdir}: no sound checkpoint among steps {', '.join(map(str, damaged))}; "
        "restore the folder from a copy, or start again with another --workdir"
    )


def _difference(arrays, recorded: dict) -> str:
    """Returns how arrays differ from what was saved, "" if they do not."""
    prints, bad = examine(arrays)
    if bad:
        return f"{len(bad)} arrays have numbers that are not finite, first {bad[0]}"
    wrong = [name for name, value in prints.items() if recorded.get(name) != value]
    return f"{len(wrong)} arrays are not what was saved, first {wrong[0]}" if wrong else ""


def _committed(folder: Path) -> list[int]:
    """Returns the steps of the whole checkpoints in a folder; a run may add and remove some meanwhile."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError, ValueError):  # removed between its listing and a look at it
            return [found.step for found in ocp.path.step.standard_name_format().find_all(folder)]
    return []


def _of_process_0(steps: Callable[[], list[int]]) -> list[int]:
    return steps() if jax.process_count() == 1 else json.loads(tell(json.dumps(steps())))


def _everywhere(sound: bool) -> bool:
    if jax.process_count() == 1:
        return sound
    return bool(np.all(multihost_utils.process_allgather(np.array(sound))))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def restore_ema(workdir: Path, abstract_params: dict, name: str = "ema", shardings=None) -> tuple[dict, int]:
    """Reads the generator's EMA from the newest sound checkpoint of a run, and no other part of its state.

    Args:
      workdir: the workdir of the run.
      abstract_params: shapes and dtypes of the parameters.
      name: part of the state to read, "ema" or "generator".
      shardings: a sharding or a tree of shardings for the parameters; default: the first local device.

    Returns:
      params: nested dict of arrays.
      step: the step of the checkpoint.

    Raises:
      WorkdirError: if the run has no checkpoint yet, or none is sound.
    """
    directory = (workdir / "checkpoints").resolve()
    if not _committed(directory):
        raise WorkdirError(f"{workdir} has no checkpoint yet; train longer than config.checkpoint_every steps")
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract_params)
    target = {
        name: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_params, shardings)
    }
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )

    def read(step: int) -> tuple[dict, dict, dict]:
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = checkpointer.restore(directory / str(step) / "state", args=arguments)
        recorded = json.loads((directory / str(step) / "fingerprints" / "metadata").read_text())
        return state[name], state, recorded

    step, params = newest_sound(workdir, lambda: _committed(directory), read)
    return params, step

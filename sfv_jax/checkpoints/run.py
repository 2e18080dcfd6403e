"""Training checkpoints: state, data position and config of a run, by orbax.

`workdir/config.json` contains the config of the run, `workdir/checkpoints/STEP` everything that is needed to continue.
A checkpoint is committed in one step, so a crash leaves either a whole checkpoint or none. Every array is saved with a
fingerprint, because the storage does not detect a flipped bit in stored numbers; a checkpoint that does not match its
fingerprints is moved away, and the one before is used.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import replacing
from sfv_jax.runtime.plain_config import flat

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
    "alarms.min_live",
    "alarms.max_gap",
    "alarms.min_motion",
    "alarms.max_data_wait",
    "wandb_project",
    "profile_start",
    "profile_steps",
)
DAMAGED = "damaged"  # folder of a workdir for damaged checkpoints


class WorkdirError(UserError):
    """Workdir that cannot be used for this run; the message gives the cause and the remedy."""


def claim_workdir(workdir: Path, config: dict, renew: Callable[[dict, dict], dict] = lambda old, new: old) -> None:
    """Records `config` in `workdir`, or checks that it equals the recorded one.

    Fields of `MAY_CHANGE` (length, reporting and mesh) may differ between runs of the same workdir.

    Args:
      workdir: the workdir.
      config: config of the run (JSON).
      renew: function from the recorded flat fields and those of `config` to the recorded ones in today's form.

    Raises:
      WorkdirError: if any other field differs; lists all of them.
    """
    path, text = workdir / "config.json", json.dumps(config, indent=1)
    if path.exists():
        old, new = flat(json.loads(path.read_text())), flat(json.loads(text))  # JSON turns tuples into lists
        old = renew(old, new)
        names = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
        if names:
            lines = [f"  {k}: {old.get(k, '(absent)')!r} there, {new.get(k, '(absent)')!r} now" for k in names]
            raise WorkdirError(
                f"{workdir} holds a run of another config; use another --workdir, or restore these fields:\n"
                + "\n".join(lines)
            )
    workdir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def fingerprints(state) -> dict[str, int]:
    """Returns a 32-bit checksum per array of a tree, by path: element bits times an odd weight from the index, summed.

    Any change of a single element changes the checksum. Integer sums do not depend on their order, so neither the mesh
    nor the number of processes matters. Elements have at most 4 bytes.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    # With several fake devices on a CPU, collectives of many programs in flight may block each other's threads forever.
    finish = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x
    values = jax.device_get([finish(_fingerprint(x)) for _, x in leaves])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(v)
        for (path, _), v in zip(leaves, values, strict=True)
    }


class Checkpoints:
    """Asynchronous saves of `{state, data, config}` under `workdir/checkpoints`.

    Args:
      workdir: the workdir of the run.
      keep: number of newest checkpoints that are kept.
      keep_every: checkpoints whose step is a multiple of this are kept permanently; 0: none.
      config: config of the run (JSON), saved to document a checkpoint found without its workdir; never read.
    """

    def __init__(self, workdir: Path, keep: int = 3, keep_every: int = 0, config: dict | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self.workdir, self.folder, self.config = workdir, (workdir / "checkpoints").resolve(), config or {}
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the newest committed step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: dict, data: dict) -> None:
        """Starts to save a checkpoint and returns before it is written.

        Args:
          step: number of finished steps.
          state: tree of arrays.
          data: position of the loader (JSON).

        Raises:
          WorkdirError: if this or the previous checkpoint cannot be written, for example because the disk is full.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            fingerprints=ocp.args.JsonSave(fingerprints(state)),
            config=ocp.args.JsonSave(self.config),
        )
        self._guard(lambda: self.manager.save(step, args=items))

    def restore(self, abstract_state: dict) -> tuple[int, dict, dict] | None:
        """Returns `(step, state, data)` of the newest sound checkpoint, None if no checkpoint exists.

        Arrays have the shapes, dtypes and shardings of `abstract_state`. Newer, damaged checkpoints are reported and
        moved to `workdir/damaged`.

        Raises:
          WorkdirError: if there are checkpoints but none is sound.
        """

        def read(step: int) -> tuple[dict, dict, dict]:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state),
                data=ocp.args.JsonRestore(),
                fingerprints=ocp.args.JsonRestore(),
            )
            restored = self.manager.restore(step, args=items)
            return restored["state"], restored["data"], restored["fingerprints"]

        steps = sorted(self.manager.all_steps(), reverse=True)
        if not steps:
            return None
        step, (state, data, _) = newest_sound(self.workdir, steps, read, lambda found: found[0], lambda found: found[2])
        if newer := [s for s in steps if s > step]:
            self._set_aside(newer)
        return step, state, data

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = self.workdir / DAMAGED / str(step)
                target.parent.mkdir(exist_ok=True)
                while target.exists():
                    target = target.with_name(target.name + "_")
                (self.folder / str(step)).rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self.manager.reload()

    def close(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          WorkdirError: if the last one could not be written.
        """
        try:
            self._guard(self.manager.wait_until_finished)
        finally:
            self.manager.close()

    def _guard(self, call: Callable) -> None:
        try:
            call()
        except Exception as error:  # for a full disk OSError, tensorstore's ValueError or one of orbax's own
            last = self.manager.latest_step()
            kept = f"the checkpoint of step {last} is intact" if last is not None else "there is no earlier one"
            raise WorkdirError(
                f"{self.workdir}: a checkpoint could not be written ({_first_line(error)}); {kept}. "
                "Make room or repair the disk, then run the same command again"
            ) from error


def newest_sound(
    workdir: Path, steps: list[int], read: Callable, state_of: Callable, prints_of: Callable
) -> tuple[int, Any]:
    """Finds the newest checkpoint that can be read and matches its fingerprints; reports damaged ones on stderr.

    Args:
      workdir: the workdir, for messages.
      steps: steps of the checkpoints, newest first.
      read: function from a step to the content of its checkpoint.
      state_of, prints_of: functions from that content to its arrays and to its recorded fingerprints.

    Returns:
      step: the step.
      content: the result of `read(step)`.

    Raises:
      WorkdirError: if no checkpoint is sound.
    """
    for step in steps:
        found, problem = None, ""
        try:
            found = read(step)
            recorded = prints_of(found)
            wrong = [name for name, value in fingerprints(state_of(found)).items() if recorded.get(name) != value]
            if wrong:
                problem = f"{len(wrong)} arrays are not what was saved, first {wrong[0]}"
        except Exception as error:  # broken files make orbax, tensorstore and json raise errors of many kinds
            problem = _first_line(error)
        if _everywhere(not problem):
            return step, found
        print(f"{workdir}: checkpoint {step} is damaged ({problem or 'in another process'})", file=sys.stderr)
    raise WorkdirError(
        f"{workdir}: no sound checkpoint among steps {', '.join(map(str, steps))}; "
        "restore the folder from a copy, or start again with another --workdir"
    )


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
    names = ocp.path.step.standard_name_format().find_all(directory)
    steps = sorted((found.step for found in names), reverse=True)
    if not steps:
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

    def read(step):
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = checkpointer.restore(directory / str(step) / "state", args=arguments)
        return state, json.loads((directory / str(step) / "fingerprints" / "metadata").read_text())

    step, (state, _) = newest_sound(workdir, steps, read, lambda found: found[0], lambda found: found[1])
    return state[name], step

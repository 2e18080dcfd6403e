"""Training checkpoints: state, data position and config of a run, by orbax.

`workdir/config.json` says what the run is; `workdir/checkpoints/STEP` holds what it needs to go on. A step is committed
at once, so a crash leaves either a whole checkpoint or none. Every array is saved with a fingerprint, because a flipped
bit in stored numbers is not noticed by the storage; a checkpoint that does not match is set aside, and the one before
is used.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sfv_jax.errors import UserError
from sfv_jax.runtime.files import replacing

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
DAMAGED = "damaged"  # folder of a workdir for checkpoints that cannot be read


class WorkdirError(UserError):
    """The working directory cannot be used for this run; the message says why and what to do."""


def claim_workdir(workdir: Path, config: dict) -> None:
    """Records `config` in `workdir`, or checks that it is the one recorded there.

    Fields of `MAY_CHANGE` (length and reporting) may differ between runs of the same workdir.

    Raises:
      WorkdirError: listing every other field that differs.
    """
    path, text = workdir / "config.json", json.dumps(config, indent=1)
    if path.exists():
        old, new = flat(json.loads(path.read_text())), flat(json.loads(text))  # JSON turns tuples into lists
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


def flat(config: dict, prefix: str = "") -> dict:
    """{"a.b": value} of nested dicts."""
    fields = {}
    for k, v in config.items():
        fields |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return fields


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def fingerprints(state) -> dict[str, int]:
    """32 bits of every array of a tree, by path: the sum of its words, each times an odd number that tells its place.

    Any change of a single element changes it. Integer sums do not depend on their order, so neither the mesh nor the
    number of processes matters. Elements are of at most 4 bytes.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    # Several fake devices on a CPU: collectives of many programs in flight can wait for each other's threads for ever.
    finish = jax.block_until_ready if jax.default_backend() == "cpu" else lambda x: x
    values = jax.device_get([finish(_fingerprint(x)) for _, x in leaves])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(v)
        for (path, _), v in zip(leaves, values, strict=True)
    }


class Checkpoints:
    """Asynchronous saves of `{state, data, config}` under `workdir/checkpoints`.

    Args:
      keep: the newest so many are kept.
      keep_every: checkpoints of steps that it divides are kept for ever; 0 for none.
      config: what made the state, JSON; saved for whoever finds a checkpoint alone, never read back.
    """

    def __init__(self, workdir: Path, keep: int = 3, keep_every: int = 0, config: dict | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self.workdir, self.folder, self.config = workdir, (workdir / "checkpoints").resolve(), config or {}
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Newest committed step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: dict, data: dict) -> None:
        """Starts saving and returns early.

        Args:
          state: a tree of arrays.
          data: the loader's position, JSON.
        Raises:
          WorkdirError: if this save or the one before cannot be written, say because the disk is full.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            fingerprints=ocp.args.JsonSave(fingerprints(state)),
            config=ocp.args.JsonSave(self.config),
        )
        self._guard(lambda: self.manager.save(step, args=items))

    def restore(self, abstract_state: dict) -> tuple[int, dict, dict] | None:
        """(step, state, data) of the newest checkpoint that is sound, None if none was ever saved.

        Arrays come back in the shapes, dtypes and shardings of `abstract_state`. Newer checkpoints that are damaged are
        reported and moved to `workdir/damaged`.

        Raises:
          WorkdirError: if there are checkpoints but none is sound.
        """

        def read(step):
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state),
                data=ocp.args.JsonRestore(),
                fingerprints=ocp.args.JsonRestore(),
            )
            restored = self.manager.restore(step, args=items)
            return restored.state, restored.data, restored.fingerprints

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
        """Waits for saves under way.

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
        except Exception as error:  # a full disk has many faces: OSError, tensorstore's ValueError, orbax's own
            last = self.manager.latest_step()
            kept = f"the checkpoint of step {last} is intact" if last is not None else "there is no earlier one"
            raise WorkdirError(
                f"{self.workdir}: a checkpoint could not be written ({_first_line(error)}); {kept}. "
                "Make room or repair the disk, then run the same command again"
            ) from error


def newest_sound(workdir: Path, steps: list[int], read: Callable, state_of: Callable, prints_of: Callable):
    """(step, what `read(step)` returned) of the first of `steps` that can be read and matches its fingerprints.

    Args:
      steps: newest first.
      state_of, prints_of: the arrays and the recorded fingerprints in what `read` returns.
    Raises:
      WorkdirError: if none is sound.
    """
    for step in steps:
        try:
            found, problem = read(step), ""
            recorded = prints_of(found)
            wrong = [name for name, value in fingerprints(state_of(found)).items() if recorded.get(name) != value]
            if wrong:
                problem = f"{len(wrong)} arrays are not what was saved, first {wrong[0]}"
        except Exception as error:  # whatever a broken file makes orbax, tensorstore or json raise
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
    """(EMA of the generator, step) of the newest sound checkpoint of a run; nothing else is read.

    Args:
      abstract_params: shapes and dtypes of the parameters.
      name: the part of the state to read, "ema" or "generator".
      shardings: where to put them, a sharding or a tree of them; default: the first local device.
    Raises:
      WorkdirError: if the run has not saved a checkpoint yet, or none is sound.
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

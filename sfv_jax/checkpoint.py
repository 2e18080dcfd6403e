"""Training checkpoints: state, data position and config of a run, by orbax.

`workdir/config.json` says what the run is; `workdir/checkpoints/STEP` holds what it needs to go on. A step is committed
by renaming, so a crash leaves either a whole checkpoint or none.
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_count")


class WorkdirError(ValueError):
    """The working directory cannot be used for this run; the message says why and what to do."""


def claim_workdir(workdir: Path, config: dict) -> None:
    """Records `config` in `workdir`, or checks that it is the one recorded there.

    Fields of `MAY_CHANGE` (length and reporting) may differ between runs of the same workdir.

    Raises:
      WorkdirError: listing every other field that differs.
    """
    path, text = workdir / "config.json", json.dumps(config, indent=1)
    if path.exists():
        old, new = _flat(json.loads(path.read_text())), _flat(json.loads(text))  # JSON turns tuples into lists
        names = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
        if names:
            lines = [f"  {k}: {old.get(k, '(absent)')!r} there, {new.get(k, '(absent)')!r} now" for k in names]
            raise WorkdirError(
                f"{workdir} holds a run of another config; use another --workdir, or restore these fields:\n"
                + "\n".join(lines)
            )
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for k, v in config.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return flat


class Checkpoints:
    """Asynchronous saves of `{state, data}` under `workdir/checkpoints`, the newest `keep` kept."""

    def __init__(self, workdir: Path, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)

    def latest(self) -> int | None:
        """Newest committed step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: dict, data: dict) -> None:
        """Starts saving `state` (a tree of arrays) and `data` (the loader's position, JSON) and returns early."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        self.manager.save(step, args=items)

    def restore(self, step: int, abstract_state: dict) -> tuple[dict, dict]:
        """(state, data) of `step`; arrays come back in the shapes, dtypes and shardings of `abstract_state`."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=items)
        return restored.state, restored.data

    def close(self) -> None:
        """Waits for saves under way."""
        self.manager.wait_until_finished()
        self.manager.close()


def restore_ema(workdir: Path, abstract_params: dict, name: str = "ema") -> tuple[dict, int]:
    """(EMA of the generator, step) of the newest checkpoint of a run; nothing else is read.

    `name` is the part of the state to read, "ema" or "generator"; both have the shapes of `abstract_params`.

    Raises:
      WorkdirError: if the run has not saved a checkpoint yet.
    """
    directory = (workdir / "checkpoints").resolve()
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
    if step is None:
        raise WorkdirError(f"{workdir} has no checkpoint yet; train longer than config.checkpoint_every steps")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract_params)}
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            directory / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True),
        )
    return restored[name], step

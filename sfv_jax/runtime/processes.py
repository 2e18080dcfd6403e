"""Several processes of one run: joining them, agreement on settings, and actions that only process 0 takes."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sfv_jax.errors import UserError


class ProcessError(UserError):
    """Failure of the processes of a run to work together; the message gives the reason."""


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process with the others of its run; does nothing for a single process.

    Call it before the first use of a device.

    Args:
      coordinator: "HOST:PORT" of process 0, reachable from all; requires the other two arguments. "auto" lets JAX
        find all three (TPU pod, SLURM, Open MPI, Kubernetes with its Python client). None does the same if the
        environment is that of a SLURM step or a TPU pod with more than one process.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.

    Raises:
      ProcessError: if the arguments do not fit together, or the others cannot be reached.
    """
    arguments: dict[str, Any] = {}  # JAX finds them
    if coordinator in (None, "auto"):
        if num_processes is not None or process_id is not None:
            raise ProcessError("--num_processes and --process_id need --coordinator=HOST:PORT of process 0")
        if coordinator is None and not in_cluster(os.environ):
            return
    elif num_processes is None or process_id is None:
        raise ProcessError("--coordinator=HOST:PORT needs --num_processes and --process_id")
    elif not 0 <= process_id < num_processes:
        raise ProcessError(f"--process_id={process_id} is not one of {num_processes} processes: 0 is the first")
    elif not coordinator.rpartition(":")[2].isdigit():
        raise ProcessError(f"--coordinator={coordinator} has no port: HOST:PORT")
    else:
        arguments = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        where = coordinator or "the processes of this cluster"
        raise ProcessError(f"cannot join {where}: {(str(error).splitlines() or [''])[0]}") from error


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether environment variables are those of a SLURM step or a TPU pod with more than one process."""
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def tell(text: str) -> str:
    """Returns the `text` that process 0 passes, in every process; all of them must call it."""
    content = np.array(list(text.encode()), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not size:
        return ""
    buffer = np.resize(content, size)  # only the bytes of process 0 are sent
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode()


def agree(settings: dict) -> None:
    """Checks that every process was started with the same `settings`, a flat dict of JSON values.

    Raises:
      ProcessError: in all processes if one differs from process 0; the message of that one names the fields.
    """
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(settings))
    theirs = json.loads(tell(json.dumps(settings)))
    # As text, since NaN does not equal itself.
    names = [k for k in sorted(mine.keys() | theirs.keys()) if repr(mine.get(k)) != repr(theirs.get(k))]
    others = np.flatnonzero(multihost_utils.process_allgather(np.bool_(len(names) > 0)))
    if names:
        fields = ", ".join(f"{k}={mine.get(k)!r} here, {theirs.get(k)!r} there" for k in names)
        raise ProcessError(f"this process was started with other settings than process 0: {fields}")
    if len(others):
        raise ProcessError(f"started with other settings than process 0: process {', '.join(map(str, others))}")


def once(action: Callable[[], None]) -> None:
    """Runs `action` in process 0 while the others wait.

    Raises:
      Exception: in process 0, if `action` raises it.
      ProcessError: in the others, if `action` raises an exception; the message contains that of the exception.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as caught:  # of any kind: the others must not wait forever
            error = caught
    if jax.process_count() > 1:
        text = tell("" if error is None else f"{type(error).__name__}: {error}")
        if text and error is None:
            raise ProcessError(f"process 0 stopped: {text}")
    if error is not None:
        raise error


def whole(x: jax.Array) -> np.ndarray:
    """Returns all values of an array whose parts may be in other processes; all processes must call it."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

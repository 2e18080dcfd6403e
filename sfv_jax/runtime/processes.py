"""One run in several processes: joining them, and doing once what only one may do."""

import json
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from sfv_jax.errors import UserError


class ProcessError(UserError):
    """The processes of a run cannot work together; the message says why."""


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process with the others of its run; nothing to do for a single process.

    Must come before anything that uses a device.

    Args:
      coordinator: "HOST:PORT" of process 0, reachable from all; then the other two are needed as well. "auto" lets JAX
        find all three (TPU pod, SLURM, Open MPI, Kubernetes with its Python client). None does the same if the
        environment is that of a SLURM step or a TPU pod with more than one process.
    Raises:
      ProcessError: if the arguments do not fit together, or the others cannot be reached.
    """
    given = num_processes is not None, process_id is not None
    if coordinator in (None, "auto"):
        if any(given):
            raise ProcessError("--num_processes and --process_id need --coordinator=HOST:PORT of process 0")
        if coordinator is None and not in_cluster(os.environ):
            return
        arguments = {}
    elif not all(given):
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


def in_cluster(environment) -> bool:
    """Whether environment variables are those of a SLURM step or a TPU pod with more than one process."""
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def tell(text: str) -> str:
    """The `text` of process 0, in all of them."""
    content = np.array(list(text.encode()), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not size:
        return ""
    buffer = np.resize(content, size)  # the others' bytes count for nothing
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode()


def agree(settings: dict) -> None:
    """Makes sure that every process was started with the same `settings` (flat, JSON values).

    Raises:
      ProcessError: in all of them if one was not; that one names the fields.
    """
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(settings))
    theirs = json.loads(tell(json.dumps(settings)))
    names = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
    others = np.flatnonzero(multihost_utils.process_allgather(np.bool_(len(names) > 0)))
    if names:
        fields = ", ".join(f"{k}={mine.get(k)!r} here, {theirs.get(k)!r} there" for k in names)
        raise ProcessError(f"this process was started with other settings than process 0: {fields}")
    if len(others):
        raise ProcessError(f"started with other settings than process 0: process {', '.join(map(str, others))}")


def once(action: Callable[[], None]) -> None:
    """Runs `action` in process 0 while the others wait.

    Raises:
      what `action` raised, in process 0; ProcessError with its message in the others.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as caught:  # whatever it is, the others must not wait for ever
            error = caught
    if jax.process_count() > 1:
        text = tell("" if error is None else f"{type(error).__name__}: {error}")
        if text and error is None:
            raise ProcessError(f"process 0 stopped: {text}")
    if error is not None:
        raise error


def whole(x: jax.Array) -> np.ndarray:
    """The values of an array whose parts may lie in other processes. To be called by all of them."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

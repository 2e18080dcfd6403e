"""How fast training is: where the time of a step goes, FLOP/s against what the device could do, memory."""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.extend import core

# Dense bf16 (V100: fp16) FLOP/s of one device, from the makers' data sheets, by a part of jax's `device_kind`.
# The first that fits counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device; None if it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), None)


def count_flops(function: Callable, *args) -> float:
    """FLOPs of the matrix products and convolutions of one call, from its jaxpr: nothing is compiled or run.

    A multiply-add is two. Scans count with their length, branches with the largest. Everything elementwise is left out,
    and so is what custom calls (fused attention) do inside: count a function without them.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval if eqn.outvars else None
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            total += 2 * out.size * kernel.size / kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        elif eqn.primitive.name == "cond":
            total += max(_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            total += eqn.params.get("length", 1) * sum(map(_flops, _inner(eqn.params))) if _inner(eqn.params) else 0
    return total


def _inner(params: dict) -> list:
    values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [
        v.jaxpr if isinstance(v, core.ClosedJaxpr) else v
        for v in values
        if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))
    ]


def peak_memory() -> dict[str, float]:
    """`memory/peak_gib`: the most memory that any local device has used so far; empty where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"memory/peak_gib": max(peaks) / 2**30} if peaks else {}


class Clock:
    """Time per step between calls of `lap`, and what it was spent on.

    Args:
      step: steps finished when it starts.
      flops: FLOPs of a step per device, None to leave speed out.
      peak: FLOP/s of a device, None to leave the share of it out.
    """

    def __init__(self, step: int, flops: float | None = None, peak: float | None = None):
        self.step, self.began, self.flops, self.peak = step, None, flops, peak
        self.spent = {"data_wait": 0.0, "device": 0.0}

    @contextmanager
    def measure(self, name: str):
        """Context of the wait for a batch ("data_wait"), or of starting a step or waiting for one ("device")."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] += time.monotonic() - start

    def pause(self) -> None:
        """Leaves what happened since the last lap out of the next one."""
        self.began = None

    def lap(self, step: int) -> dict[str, float]:
        """Seconds per step since the last lap; empty for the first, which compiled, and after a pause.

        `time/step` is all of it; `time/host` is what is left of it after `time/data_wait` and `time/device`. With it
        `speed/tflops` and `speed/mfu` per device, if FLOPs are known.
        """
        now, values = time.monotonic(), {}
        if self.began is not None and step > self.step:
            steps = step - self.step
            seconds = (now - self.began) / steps
            spent = {f"time/{name}": value / steps for name, value in self.spent.items()}
            values = {"time/step": seconds, **spent, "time/host": seconds - sum(spent.values())}
            if self.flops:
                values["speed/tflops"] = self.flops / seconds / 1e12
                if self.peak:
                    values["speed/mfu"] = self.flops / seconds / self.peak
        self.step, self.began, self.spent = step, now, dict.fromkeys(self.spent, 0.0)
        return values


class Trace:
    """A jax.profiler trace of `steps` steps after step `start`, under `folder`; TensorBoard and Perfetto show it."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder, self.start, self.end, self.running = folder, start, start + steps, False

    def at(self, step: int, state) -> None:
        """To be called before each step (1-based) with the state it starts from; waits for it at both ends."""
        if self.start < step <= self.end and not self.running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running, self.start = True, self.end
        elif step > self.end and self.running:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace under way."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

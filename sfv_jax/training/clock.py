"""Speed of training: parts of the time of a step, FLOP/s in relation to the peak of the device, profiler traces."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import jax


class Clock:
    """Time per step between calls of `lap`, and its parts.

    Args:
      step: number of steps finished at the start.
      flops: FLOPs of a step per device; None leaves out `speed/*`.
      peak: peak FLOP/s of a device; None leaves out `speed/mfu`.
    """

    def __init__(self, step: int, flops: float | None = None, peak: float | None = None):
        self.step, self.flops, self.peak = step, flops, peak
        self.began: float | None = None
        self.spent = {"data_wait": 0.0, "device": 0.0}

    @contextmanager
    def measure(self, name: str) -> Generator[None, None, None]:
        """Adds the time of its block to "data_wait" (waiting for a batch) or "device" (starting or awaiting a step)."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] += time.monotonic() - start

    def pause(self) -> None:
        """Excludes the time since the last lap; the next lap returns nothing."""
        self.began = None

    def lap(self, step: int) -> dict[str, float]:
        """Ends a lap after `step` finished steps.

        Returns:
          Seconds per step since the last lap: `time/step`, the sum of `time/data_wait`, `time/device` and the remainder
          `time/host`; and per device `speed/tflops` and `speed/mfu`, if FLOPs and peak are known. Empty for the first
          lap, which compiled, and after a pause.
        """
        now = time.monotonic()
        values: dict[str, float] = {}
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
    """Trace by jax.profiler of the `steps` steps after step `start`, in `folder`, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder, self.start, self.end, self.running = folder, start, start + steps, False

    def at(self, step: int, state) -> None:
        """Starts or ends the trace; call it before each step (1-based) with the state, for which both ends wait."""
        if self.start < step <= self.end and not self.running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running, self.start = True, self.end
        elif step > self.end and self.running:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

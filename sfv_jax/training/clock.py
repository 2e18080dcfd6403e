"""How fast training is: where the time of a step goes, FLOP/s against what the device could do, memory."""

import time
from contextlib import contextmanager
from pathlib import Path

import jax


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

"""Path of the metrics of a run from device to disk and terminal: fetched late, checked, averaged, written."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from sfv_jax.runtime.device import peak_memory
from sfv_jax.runtime.progress import ProgressReport
from sfv_jax.training.alarms import Alarms, TrainingStopped, mean_of, not_finite
from sfv_jax.training.clock import Clock
from sfv_jax.training.metrics import MetricWriter


class Journal:
    """Buffer of the metrics of steps. They are fetched one log interval late, so that the device never waits.

    Args:
      config: config of the run.
      clock: clock of the steps.
      writer: receiver of metrics and alarms.
      report: line or bar on the terminal.
      saved: function that returns the step of the newest checkpoint or None; called when a run stops.
    """

    def __init__(
        self,
        config: ConfigDict,
        clock: Clock,
        writer: MetricWriter,
        report: ProgressReport,
        saved: Callable[[], int | None],
    ):
        self.alarms, self.on_alarm = Alarms(config.alarms), config.alarms.on_alarm
        self.clock, self.writer, self.report, self.saved = clock, writer, report, saved
        self.first, self.running, self.finished = report.first + 1, [], []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Appends the metrics of the next step."""
        self.running.append(metrics)

    def end_interval(self) -> None:
        """Writes the previous interval, which the device has finished, and starts the next one."""
        self.flush()
        self.finished, self.running = self.running, []

    def flush(self, everything: bool = False) -> None:
        """Writes the last finished interval.

        Args:
          everything: also check the steps after it, which waits for the device.

        Raises:
          TrainingStopped: if a number is not finite, or an alarm stops the run.
        """
        with self.clock.measure("device"):
            finished = jax.device_get(self.finished)
            running = jax.device_get(self.running) if everything else []
        for offset, metrics in enumerate(finished + running):
            if cause := not_finite(metrics):
                self.stop(self.first + offset, "nan", f"not finite: {cause}")
        self.finished = []
        if everything:
            self.clock.pause()  # the device became idle: times of this interval and the next would be too long
        if finished:
            self.first += len(finished)
            self._write(self.first - 1, summary(finished))
        if everything:
            self.clock.pause()

    def _write(self, step: int, values: dict[str, float]) -> None:
        values |= self.clock.lap(step) | peak_memory()
        self.writer.scalars(step, values)
        self.report.note(step, line(values))
        for alarm in self.alarms.check(values):
            if self.on_alarm == "stop" and alarm.kind != "data":  # times differ between processes, and all must stop
                self.stop(step, *alarm)
            self.writer.alarm(step, *alarm)
            self.report.print(f"ALARM at step {step}: {alarm.message}")

    def stop(self, step: int, kind: str, message: str) -> NoReturn:
        """Records an alarm at `step` and ends the run.

        Raises:
          TrainingStopped: always, with the message and how to continue.
        """
        self.writer.alarm(step, kind, message)
        saved = self.saved()
        if saved is None:
            advice = "there is no checkpoint yet: start again with another --workdir"
        else:
            advice = (
                f"checkpoint {saved} is untouched: the same command repeats from there; to change settings, start in "
                f"another --workdir with --config.init={self.writer.workdir} --config.init_weights=generator"
            )
        raise TrainingStopped(f"stopped by step {step}: {message}; {advice}")


def summary(steps: Sequence[dict]) -> dict[str, float]:
    """Returns the means over the steps of an interval; NaN marks values that a step did not measure.

    The flags `nonfinite/*` are left out; `motion/ratio` is the ratio of the means.
    """
    values = {}
    for name in steps[0]:
        measured = [m[name] for m in steps if not np.isnan(m[name])]
        if measured and not name.startswith("nonfinite/"):
            values[name] = float(np.mean(measured))
    if values.get("motion/real"):
        values["motion/ratio"] = values["motion/fake"] / values["motion/real"]
    return values


def line(values: dict[str, float]) -> str:
    """Returns the terminal line of an interval: step time, losses, and the state of the adversarial game."""
    parts = []
    if "time/step" in values:
        parts.append(f"{values['time/step']:.3f} s/step")
        if values["time/data_wait"] > 0.05 * values["time/step"]:
            parts.append(f"data wait {values['time/data_wait'] / values['time/step']:.0%}")
    if "speed/mfu" in values:
        parts.append(f"mfu {values['speed/mfu']:.0%}")
    parts += [f"{k.removeprefix('loss/')} {v:.4g}" for k, v in values.items() if k.startswith("loss/")]
    if (live := mean_of(values, "live/")) is not None:
        parts.append(f"live {live:.0%}")
    if "motion/ratio" in values:
        parts.append(f"motion {values['motion/ratio']:.2f}")
    return "  ".join(parts)

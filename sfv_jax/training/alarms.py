"""Says early when training goes wrong: numbers that are not finite, a discriminator that has won, frames that stand
still, an accelerator that waits for data.

Works on the metrics of a run alone, so it can be tried on any sequence of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sfv_jax.errors import UserError

# Gradients flow in this order, so the first block that is not finite is nearest to the cause.
GROUPS = ("batch", "generator_gradient", "heads_gradient", "generator", "heads")
BACKWARD = ("conv_out", "conv_norm_out", "up_blocks", "mid_block", "down_blocks", "conv_in")


class Alarm(NamedTuple):
    """What went wrong (`kind`: "discriminator", "motion" or "data") and a line that says so with numbers and advice."""

    kind: str
    message: str


class TrainingStopped(UserError):
    """Training stopped by an alarm; the message is one line with the step, the cause and how to go on."""


class Alarms:
    """Compares the metrics of every log interval with the thresholds of `config.alarms`.

    An alarm is given once, after `patience` intervals in a row beyond its threshold, and again only after an interval
    within it. Metrics that a method does not report are not watched.
    """

    def __init__(self, config):
        self.config, self.count = config, dict.fromkeys(("discriminator", "motion", "data"), 0)

    def check(self, values: Mapping[str, float]) -> list[Alarm]:
        """Alarms that `values`, the metrics of one interval, complete."""
        found = {
            "discriminator": self._discriminator(values),
            "motion": self._motion(values),
            "data": self._data(values),
        }
        alarms = []
        for kind, message in found.items():
            self.count[kind] = self.count[kind] + 1 if message else 0
            if self.count[kind] == self.config.patience:
                alarms.append(Alarm(kind, f"{message}, {self.config.patience} log intervals in a row"))
        return alarms

    def _discriminator(self, values) -> str | None:
        live, gap = mean_of(values, "live/"), mean_of(values, "gap/")
        advice = "lower config.heads_optimizer.lr or raise the R1 weight"
        if live is not None and live < self.config.min_live:
            return f"saturated discriminator ({advice}): {live:.2g} of its losses' slope is left"
        if gap is not None and self.config.max_gap and gap > self.config.max_gap:
            return f"saturated discriminator ({advice}): logits of real and fake are {gap:.3g} apart"
        return None

    def _motion(self, values) -> str | None:
        ratio = values.get("motion/ratio")
        if ratio is None or not ratio < self.config.min_motion:
            return None
        return (
            f"frames stand still (are the temporal heads on? lower the reconstruction weight): motion of the fakes is "
            f"{ratio:.2g} of the real videos'"
        )

    def _data(self, values) -> str | None:
        if not self.config.max_data_wait or not {"time/step", "time/data_wait", "time/device"} <= values.keys():
            return None
        wait, device = (values[name] / values["time/step"] for name in ("time/data_wait", "time/device"))
        # Waiting costs nothing while the device is still busy: then the host waits for it afterwards.
        if wait <= self.config.max_data_wait or device > 0.05:
            return None
        return f"data starvation (a faster disk, or a smaller batch): {wait:.0%} of the time is spent waiting for data"


def mean_of(values: Mapping[str, float], prefix: str) -> float | None:
    """Mean of all metrics with a prefix; None without any."""
    found = [v for k, v in values.items() if k.startswith(prefix)]
    return sum(found) / len(found) if found else None


def not_finite(metrics: Mapping[str, float]) -> str | None:
    """What is not finite in the metrics of one step, the likeliest cause first; None if nothing is.

    `metrics`: `loss/*`, and `nonfinite/GROUP/BLOCK` flags as `state.watch` makes them.
    """
    bad = [k.removeprefix("nonfinite/") for k, v in metrics.items() if k.startswith("nonfinite/") and v]
    losses = [k for k, v in metrics.items() if k.startswith("loss/") and not np.isfinite(v)]
    if not bad:
        return losses[0] if losses else None
    first = min(bad, key=_place)
    return first if len(bad) == 1 else f"{first} (and {len(bad) - 1} more)"


def _place(name: str) -> tuple:
    group, block = name.split("/")
    part, _, number = block.partition(".")
    order = BACKWARD.index(part) if part in BACKWARD else len(BACKWARD)
    return GROUPS.index(group) if group in GROUPS else len(GROUPS), order, -int(number or 0), block

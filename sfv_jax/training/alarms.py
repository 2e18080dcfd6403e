"""Early detection of failed training: numbers that are not finite, a discriminator that has won, frames that stand
still, one loss that outweighs the other, an accelerator that waits for data.

The functions need only the metrics of a run, so they apply to any sequence of these.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sfv_jax.errors import UserError

# In the order of the backward pass: the first block that is not finite is nearest to the cause.
GROUPS = ("batch", "generator_gradient", "heads_gradient", "generator", "heads")
BACKWARD = ("conv_out", "conv_norm_out", "up_blocks", "mid_block", "down_blocks", "conv_in")


class Alarm(NamedTuple):
    """Failure of one `kind` ("discriminator", "motion", "balance" or "data"), with a line of numbers and advice."""

    kind: str
    message: str


class TrainingStopped(UserError):
    """Training stopped by an alarm; the message is one line with the step, the cause and how to continue."""


class Alarms:
    """Comparison of the metrics of every log interval with the thresholds of `config.alarms`.

    An alarm is raised once, after `patience` intervals in a row beyond its threshold, and again only after an interval
    within it. Metrics that a method does not report cause no alarm.

    Args:
      config: the section `config.alarms`.
    """

    def __init__(self, config: ConfigDict):
        self.config, self.count = config, dict.fromkeys(("discriminator", "motion", "balance", "data"), 0)

    def check(self, values: Mapping[str, float]) -> list[Alarm]:
        """Returns the alarms raised by `values`, the metrics of the next interval."""
        found = {
            "discriminator": self._discriminator(values),
            "motion": self._motion(values),
            "balance": self._balance(values),
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
            return f"saturated discriminator ({advice}): only {live:.2g} of its loss gradient is active"
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

    def _balance(self, values) -> str | None:
        ratio = values.get("ratio/adv_to_rec_gradient")
        low, high = self.config.min_adv_to_rec, self.config.max_adv_to_rec
        if ratio is None or not (ratio < low or high and ratio > high):
            return None
        leads, change = ("second", "lower") if ratio < low else ("adversarial", "raise")
        return (
            f"the {leads} loss leads ({change} the method's recon_weight, or set its balance): the adversarial "
            f"gradient is {ratio:.2g} times the other at the generator's output"
        )

    def _data(self, values) -> str | None:
        if not self.config.max_data_wait or not {"time/step", "time/data_wait", "time/device"} <= values.keys():
            return None
        wait, device = (values[name] / values["time/step"] for name in ("time/data_wait", "time/device"))
        # Waiting costs nothing while the device is busy: then the host waits for the device afterwards.
        if wait <= self.config.max_data_wait or device > 0.05:
            return None
        return f"data starvation (a faster disk, or a smaller batch): {wait:.0%} of the time is spent waiting for data"


def mean_of(values: Mapping[str, float], prefix: str) -> float | None:
    """Returns the mean of all metrics with a prefix; None if there is none."""
    found = [v for k, v in values.items() if k.startswith(prefix)]
    return sum(found) / len(found) if found else None


def not_finite(metrics: Mapping[str, float]) -> str | None:
    """Finds numbers that are not finite; returns the first cause and the number of others, None if all are finite.

    Args:
      metrics: `loss/*` of one step, and the flags `nonfinite/GROUP/BLOCK` of `methods.common.watch`.
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

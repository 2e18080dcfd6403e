"""Configs of runs that go on: fields that are younger than the run, and what the platform chose at its start."""

import sys
from typing import Any

from sfv_jax.choices import auto_dtype
from sfv_jax.runtime.plain_config import flat

# Fields added after runs had been recorded without them, with the value that does what was done before.
YOUNGER: dict[str, Any] = {
    "data.any_encoders": False,
    "trainable": "all",
    "unet.remat": False,
    "unet.temporal_conv": "conv",
    "unet.attention_kernel": "auto",
    "generator_optimizer.schedule": "constant",
    "heads_optimizer.schedule": "constant",
    "sfv.gan_loss": "hinge",
    "sfv.r1_form": "gradient",
    "sfv.perturbation_std": 0.1,
    "sfv.r2_weight": 0.0,
    "sfv.heads_every": 1,
    "backbone_init": "",
    "encoders": "",
    "alarms.min_adv_to_rec": 0.0,
    "alarms.max_adv_to_rec": 0.0,
    "sfv.probabilities": [],  # as JSON has it
    "vae.ends_weight": 1.0,
    **{f"{method}.noise_shift": False for method in ("sfv", "ladd")},
    **{f"{optimizer}.max_decay": 1.0 for optimizer in ("generator_optimizer", "heads_optimizer")},
    **{f"{optimizer}.delay_steps": 0 for optimizer in ("generator_optimizer", "heads_optimizer")},
    **{
        f"{method}.{field}": value
        for method in ("sfv", "ladd", "ufogen")
        for field, value in dict(
            balance=0.0, balance_decay=0.99, balance_limit=1000.0, heads_reduction="mean", r1_every=1
        ).items()
    },
}
GONE: dict[str, Any] = {}  # removed fields that may be in recorded runs, with the value that did nothing


def renewed(recorded: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns the recorded fields of a run as today's code would have recorded them.

    Fields that did not exist get the value that reproduces the run; removed fields that did nothing are left out, with
    a line on stderr.

    Args:
      recorded: flat fields of a `config.json`.
      now: flat fields of the config that continues the run.
    """
    idle = [name for name in GONE if name in recorded and name not in now and recorded[name] == GONE[name]]
    for name in idle:
        print(f"config.{name}={recorded[name]!r} of the recorded run is gone: it did nothing", file=sys.stderr)
    kept = {name: value for name, value in recorded.items() if name not in idle}
    return {name: value for name, value in YOUNGER.items() if name in now} | kept


def settled(config: Any, platform: str, recorded: dict[str, Any] | None = None) -> Any:
    """Returns a config in which no choice is left to the platform; a run that goes on keeps those of its start.

    Args:
      config: the config, which is not changed.
      platform: "cpu", "gpu" or "tpu".
      recorded: flat fields of the `config.json` of the run that goes on, as `renewed` returns them.
    """
    config = config.copy_and_resolve_references()
    for name in ("dtype", "unet.temporal_conv"):  # layers choose the latter, for the platform that they run on
        if flat(config.to_dict()).get(name) == "auto" and (recorded or {}).get(name, "auto") != "auto":
            config.update_from_flattened_dict({name: (recorded or {})[name]})
    if config.dtype == "auto":
        config.dtype = auto_dtype(platform)
    return config

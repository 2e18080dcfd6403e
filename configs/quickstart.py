"""The whole method on two CPU cores: `:teacher` trains a tiny base model on the procedural world, `:sfv` distills it.

    python -m sfv_jax.quickstart --workdir runs/quickstart

runs both and compares them. World, networks and learning rates are those of `reproduce`
(sfv_jax/reproduction/experiments.py): a disc or a square moves in one of four diagonal directions, so that each first
frame has four possible futures, whose average is a blur.
"""

from sfv_jax.errors import UserError
from sfv_jax.reproduction import experiments

BUDGET = experiments.Budget(base_steps=1400, steps=500, batch=8, conditions=64)


def get_config(arg: str = "teacher"):
    """Returns the config, locked; `arg` is "teacher" or "sfv"."""
    if arg not in ("teacher", "sfv"):
        raise UserError(f"configs/quickstart.py takes :teacher or :sfv, not :{arg}")
    config = experiments.world_config(experiments.BASE if arg == "teacher" else "sfv", BUDGET, seed=0).unlock()
    config.update(log_every=50 if arg == "teacher" else 20, sample_every=config.checkpoint_every)
    return config.lock()

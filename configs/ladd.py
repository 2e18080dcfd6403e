"""LADD (arXiv 2403.12015) on SVD, with SF-V's discriminator: a one-step baseline of the paper's Table 1.

    python -m sfv_jax.train --config configs/ladd.py --workdir runs/ladd \
        --config.init=models/svd --config.data.path=data/latents

`--config.ladd.teacher_steps=25` trains on videos of the base model instead of those of the cache.

`configs/ladd.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.
"""

from sfv_jax import config as defaults
from sfv_jax.errors import UserError


def get_config(arg: str = ""):
    config = defaults.ladd()
    if arg == "tiny":
        config = defaults.tiny(config)
    elif arg:
        raise UserError(f"configs/ladd.py takes :tiny or nothing, not :{arg}")
    return config.lock()

"""UFOGen (arXiv 2311.09257) on SVD, with SF-V's discriminator: a one-step baseline of the paper's Table 1.

    python -m sfv_jax.train --config configs/ufogen.py --workdir runs/ufogen \
        --config.init=models/svd --config.data.path=data/latents

`configs/ufogen.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.
"""

from sfv_jax import config as defaults
from sfv_jax.errors import UserError


def get_config(arg: str = ""):
    config = defaults.ufogen()
    if arg == "tiny":
        config = defaults.tiny(config)
    elif arg:
        raise UserError(f"configs/ufogen.py takes :tiny or nothing, not :{arg}")
    return config.lock()

"""SF-V as in the paper (NeurIPS 2024), section 4.1: 50 000 iterations, batch 32, 768x448, 14 frames, 7 fps.

    python -m sfv_jax.train --config configs/sfv.py --workdir runs/sfv \
        --config.init=models/svd --config.data.path=data/latents

`configs/sfv.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.
"""

from sfv_jax import config as defaults
from sfv_jax.errors import UserError


def get_config(arg: str = ""):
    config = defaults.sfv()
    if arg == "tiny":
        config = defaults.tiny(config)
    elif arg:
        raise UserError(f"configs/sfv.py takes :tiny or nothing, not :{arg}")
    return config.lock()

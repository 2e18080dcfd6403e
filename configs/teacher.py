"""EDM denoising: fine-tunes SVD on a latent cache with the numbers of its own last training stage.

    python -m sfv_jax.train --config configs/teacher.py --workdir runs/teacher \
        --config.init=models/svd --config.data.path=data/latents

`configs/teacher.py:tiny` trains a tiny base model on the procedural world, from a random start, on two CPU cores.
"""

from sfv_jax import config as defaults
from sfv_jax.errors import UserError


def get_config(arg: str = ""):
    config = defaults.teacher()
    if arg == "tiny":
        config = defaults.tiny(config)
    elif arg:
        raise UserError(f"configs/teacher.py takes :tiny or nothing, not :{arg}")
    return config.lock()

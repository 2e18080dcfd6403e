"""AnimateLCM (arXiv 2402.00769) on SVD: consistency distillation, sampled in 1 to 8 steps with `--sampler animatelcm`.

    python -m sfv_jax.train --config configs/animatelcm.py --workdir runs/animatelcm \
        --config.init=models/svd --config.data.path=data/latents

`configs/animatelcm.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.
"""

from sfv_jax import config as defaults
from sfv_jax.errors import UserError


def get_config(arg: str = ""):
    config = defaults.animatelcm()
    if arg == "tiny":
        config = defaults.tiny(config)
    elif arg:
        raise UserError(f"configs/animatelcm.py takes :tiny or nothing, not :{arg}")
    return config.lock()

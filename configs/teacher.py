"""EDM denoising: fine-tunes SVD on a latent cache with the numbers of its own last training stage.

    python -m sfv_jax.train --config configs/teacher.py --workdir runs/teacher \
        --config.init=models/svd --config.data.path=data/latents

`configs/teacher.py:tiny` trains a tiny base model on the procedural world, from a random start, on two CPU cores.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "SVD" is its paper; "SF-V"
marks what is as in configs/sfv.py; "choice" marks what no source states (docs/decisions.md).
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "tiny"."""
    config = defaults.teacher()
    config.steps = 50_000  # SVD, appendix D.4
    config.batch_size = 32  # SF-V; SVD, appendix D.4: 768
    config.accumulation_steps = 1  # choice
    config.ema_decay = 0.9999  # SVD, appendix D.4
    config.generator_optimizer.update(
        name="adamw",  # SVD, appendix D
        lr=3e-5,  # SVD, appendix D.4
        b1=0.9,  # choice: Adam's default
        b2=0.999,  # choice: Adam's default
        weight_decay=0.0,  # choice
        warmup_steps=0,  # choice
    )
    config.teacher.update(
        p_mean=1.0,  # SVD, appendix D.4
        p_std=1.6,  # SVD, appendix D.4
        cond_drop=0.1,  # choice: SVD's rate is unpublished; InstructPix2Pix has 0.05
        sample_steps=25,  # SVD's sampler; for the pictures made during training
    )
    return defaults.finish(config, arg)

"""LADD (arXiv 2403.12015) on SVD, with SF-V's discriminator: a one-step baseline of the paper's Table 1.

    python -m sfv_jax.train --config configs/ladd.py --workdir runs/ladd \
        --config.init=models/svd --config.data.path=data/latents

`--config.ladd.teacher_steps=25` trains on videos of the base model instead of those of the cache.

`configs/ladd.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "SF-V" marks what is as
in configs/sfv.py for all methods of Table 1; "choice" marks what no source states (docs/decisions.md).
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "tiny"."""
    config = defaults.ladd()
    config.steps = 50_000  # SF-V
    config.batch_size = 32  # SF-V
    config.accumulation_steps = 4  # SF-V
    config.ema_decay = 0.95  # SF-V
    config.generator_optimizer.update(name="sm3", lr=1e-5, momentum=0.5, beta=0.999)  # SF-V
    config.heads_optimizer.update(name="sm3", lr=1e-4, momentum=0.5, beta=0.999)  # SF-V
    config.discriminator.update(spatial_kernel=3, temporal_kernel=9, projection_dim=64, sinusoid_dim=256)  # SF-V
    config.ladd.update(
        # Noise levels.
        generator_levels=4,  # SF-V: Tg; sigma 0.002, 2.269, 70.54 and 700
        probabilities=(0.1, 0.1, 0.1, 0.7),  # LADD, from the lowest level to the highest
        warmup_steps=500,  # LADD: steps with the probabilities below
        warmup_probabilities=(0.5, 0.5, 0.0, 0.0),  # LADD: uniform over the lower levels
        discriminator_levels=1000,  # SF-V: Td
        p_mean=1.0,  # LADD: logit-normal(1, 1), which in sigma is this lognormal
        p_std=1.0,  # LADD
        shared_noise=True,  # choice: as SF-V
        # Data.
        teacher_steps=0,  # choice: real videos
        teacher_guidance=(1.0, 3.0),  # SVD's ramp, if the base model makes the videos
        # Losses.
        adv_weight=1.0,  # SF-V
        recon_weight=0.0,  # LADD: no reconstruction
        gan_loss="hinge",  # LADD
        r1_weight=1e-5,  # SF-V
        r1_form="gradient",  # SF-V
        perturbation_std=0.1,  # SF-V
        r2_weight=0.0,  # SF-V
        # Balance and turns.
        balance=0.0,  # off, as in the paper
        balance_decay=0.99,  # choice
        balance_limit=1000.0,  # choice
        heads_reduction="mean",  # choice
        r1_every=1,  # choice
        generator_every=1,  # SF-V
        heads_every=1,  # SF-V
    )
    return defaults.finish(config, arg)

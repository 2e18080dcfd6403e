"""UFOGen (arXiv 2311.09257) on SVD, with SF-V's discriminator: a one-step baseline of the paper's Table 1.

    python -m sfv_jax.train --config configs/ufogen.py --workdir runs/ufogen \
        --config.init=models/svd --config.data.path=data/latents

`configs/ufogen.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "SF-V" marks what is as
in configs/sfv.py for all methods of Table 1; "choice" marks what no source states (docs/decisions.md).
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "tiny"."""
    config = defaults.ufogen()
    config.steps = 50_000  # SF-V
    config.batch_size = 32  # SF-V
    config.accumulation_steps = 4  # SF-V
    config.ema_decay = 0.95  # SF-V
    config.generator_optimizer.update(name="sm3", lr=1e-5, momentum=0.5, beta=0.999)  # SF-V
    config.heads_optimizer.update(name="sm3", lr=1e-4, momentum=0.5, beta=0.999)  # SF-V
    config.discriminator.update(spatial_kernel=3, temporal_kernel=9, projection_dim=64, sinusoid_dim=256)  # SF-V
    config.ufogen.update(
        # Noise levels.
        levels=1000,  # choice: Td of SF-V; the level index is uniform
        jump=0.25,  # UFOGen: the discriminator's level is lower than the generator's by this share of all levels
        shared_noise=False,  # UFOGen: independent noise for real and fake
        # Losses.
        adv_weight=1.0,  # SF-V
        recon_weight=1.0,  # choice: weight of the denoising loss; UFOGen prints no number
        gan_loss="hinge",  # SF-V
        r1_weight=1e-5,  # SF-V
        r1_form="gradient",  # SF-V
        perturbation_std=0.1,  # SF-V
        r2_weight=0.0,  # SF-V
        # Turns.
        generator_every=1,  # SF-V
        heads_every=2,  # SF-V's retraining of UFOGen: every second iteration
        balance=0.0,  # off, as in the paper
        balance_decay=0.99,  # choice
        balance_limit=1000.0,  # choice
        heads_reduction="mean",  # choice
        r1_every=1,  # choice
    )
    return defaults.finish(config, arg)

"""A base model and its one-step SF-V in the procedural world, with SVD's own classes, on frames of 32x32 pixels.

    python -m sfv_jax.train --config configs/world.py:teacher --workdir runs/world_teacher
    python -m sfv_jax.train --config configs/world.py:sfv --workdir runs/world_sfv --config.init=runs/world_teacher

made the models `world-teacher` and `world` in the package. The first takes VAE and CLIP tower from the package
(configs/vae.py trained the VAE). Without `--config.init` the second starts from the base model in the package.
`:quick` is the second in fewer steps, for the quickstart. All numbers are choices; docs/world.md tells what was tried.
"""

from ml_collections import ConfigDict

from sfv_jax import config as defaults
from sfv_jax.errors import UserError
from sfv_jax.reproduction.experiments import SCENES


def get_config(arg: str = "teacher"):
    """Returns the config, locked; `arg` is "teacher", "sfv" or "quick"."""
    if arg not in ("teacher", "sfv", "quick"):
        raise UserError(f"configs/world.py takes :teacher, :sfv or :quick, not :{arg}")
    config = defaults.teacher() if arg == "teacher" else defaults.sfv()
    config.update(dict(dtype="float32", accumulation_steps=1, batch_size=8, keep_checkpoints=1))
    config.data.update(source="world", world=ConfigDict(SCENES), world_size=6000)
    config.unet.temporal_conv = "matmul"
    if arg == "teacher":
        config.update(dict(encoders="world-encoders", steps=3000, ema_decay=0.998))
        config.unet = ConfigDict(
            dict(
                in_channels=8,
                out_channels=4,
                block_out_channels=(64, 64, 64),
                num_attention_heads=(2, 2, 2),
                layers_per_block=1,
                cross_attention_dim=64,
                addition_time_embed_dim=16,
                num_frames=14,
                sample_size=8,
                norm_groups=32,  # as in diffusers
                temporal_conv="matmul",
            )
        )
        config.teacher.update(p_mean=0.5, p_std=1.8)
        config.generator_optimizer = defaults.muon(
            1e-3, b2=0.99, warmup_steps=100, clip_norm=1.0, schedule="cosine", decay_steps=2900
        )
    else:
        config.update(dict(init="world-teacher", steps=800, ema_decay=0.98))
        config.discriminator.update(temporal_kernel=5, projection_dim=32, sinusoid_dim=32)
        config.sfv.probabilities = (0.15, 0.15, 0.7)  # most training where it is used: one step from the highest level
        # The heads need many steps to see what is left of the smear, so they take four in each of the generator's.
        config.sfv.update(generator_every=4, balance=6.0)
        config.generator_optimizer = defaults.adamw(3e-4, b1=0.5, b2=0.99, delay_steps=8, warmup_steps=5)
        config.heads_optimizer = defaults.adamw(2e-3, b1=0.5, b2=0.99, warmup_steps=20)
    config.update(dict(log_every=50, checkpoint_every=250, sample_every=500))
    if arg == "quick":
        config.update(dict(steps=240, log_every=10, checkpoint_every=60, sample_every=60))
        config.generator_optimizer.delay_steps = 4
    return config.lock()

"""Temporal VAE of SVD's class, trained from the start on the procedural world in two stages, as SVD's own was:

    python -m sfv_jax.train --config configs/vae.py --workdir runs/vae
    python -m sfv_jax.train --config configs/vae.py:decoder --workdir runs/vae_decoder --config.init=runs/vae

The first trains encoder and decoder on pairs of frames, the second the decoder on whole clips, with the encoder frozen.
Frames of 32x32 pixels become latents of 8x8 cells and 4 channels.

All numbers are choices; docs/world.md tells what was tried. `sfv_jax/config.py` has all fields.
"""

from ml_collections import ConfigDict

from sfv_jax import config as defaults
from sfv_jax.errors import UserError
from sfv_jax.reproduction.experiments import VARIED


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "decoder"."""
    if arg not in ("", "decoder"):
        raise UserError(f"configs/vae.py takes :decoder or nothing, not :{arg}")
    config = defaults.vae()
    config.dtype = "float32"
    config.autoencoder = ConfigDict(
        dict(
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_groups=8,
            sample_size=32,
            temporal_conv="matmul",
        )
    )
    config.data.update(source="world", world=ConfigDict(VARIED), world_size=200_000)
    config.vae.update(num_frames=2, gradient_weight=1.0, flicker_weight=1.0, kl_weight=1e-3)
    config.update(
        dict(steps=2500, batch_size=16, log_every=50, checkpoint_every=250, sample_every=250, keep_checkpoints=1)
    )
    config.generator_optimizer.update(
        lr=1e-3, b2=0.99, warmup_steps=100, clip_norm=1.0, schedule="cosine", decay_steps=config.steps - 100
    )
    config.ema_decay = 0.995
    if arg == "decoder":
        config.update(dict(trainable="^decoder", steps=1000, batch_size=3))
        config.vae.update(num_frames=14, ends_weight=4.0)
        config.generator_optimizer.update(lr=5e-4, warmup_steps=20, decay_steps=980)
    return config.lock()

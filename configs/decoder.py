"""Distills a tiny temporal decoder from the VAE of a model folder (docs/decoder.md).

    python -m sfv_jax.train --config configs/decoder.py --workdir runs/decoder \
        --config.init=models/svd --config.data.path=data/latents
    python -m sfv_jax.convert --src runs/decoder --dst models/svd/tiny_decoder

With `--config.init=runs/sfv` the teacher is the VAE of that run's model, and the run's generator can make some of the
latents (`decoder.generated_share`). `configs/decoder.py:tiny` trains for some minutes on the procedural world; it needs
an `init`, too.

`:world` distills the decoder of the models in the package, on two CPU cores; its numbers are choices:

    python -m sfv_jax.train --config configs/decoder.py:world --workdir runs/world_decoder
    python -m sfv_jax.convert --export --what model --fp16 --src runs/world_decoder --dst models/world-decoder

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "Seraena" is the notebook of
TAESDV's author, "Turbo-VAED" the training script of arXiv 2508.09136; "choice" marks what no source states.
"""

from ml_collections import ConfigDict

from sfv_jax import config as defaults
from sfv_jax.reproduction.experiments import SCENES


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "", "tiny" or "world"."""
    config = defaults.decoder()
    config.steps = 30_000  # TAEHV's author, of a training from scratch
    config.batch_size = 16  # Seraena
    config.accumulation_steps = 1  # choice
    config.ema_decay = 0.999  # Turbo-VAED
    config.generator_optimizer.update(
        name="adamw",  # Seraena
        lr=3e-4,  # Seraena
        b1=0.9,  # Seraena
        b2=0.95,  # Seraena
        weight_decay=0.0,  # choice
        warmup_steps=100,  # choice
    )
    config.decoder.update(
        variant="tiny",  # TAESDV's layout; "wide" is ours
        crop=16,  # choice: 128 pixels of SVD; Seraena: 64 pixels
        l1_weight=1.0,  # Turbo-VAED
        flicker_weight=1.0,  # choice: each frame may be good and their errors still jump
        feature_weight=0.1,  # choice: in place of LPIPS, as the teacher's features are at hand
        real_weight=0.0,  # choice: latent caches have no frames
        adv_weight=0.0,  # choice: H3AE found little gain; about 0.01 sharpens
        r1_weight=0.01,  # choice
        generated_share=0.0,  # choice
    )
    return world(config).lock() if arg == "world" else defaults.finish(config, arg)


def world(config: ConfigDict) -> ConfigDict:
    """Changes the config to a narrower decoder for the VAE in the package, on clips of the procedural world."""
    config.update(dict(init="world-encoders", dtype="float32", steps=1500, batch_size=4, ema_decay=0.995))
    config.update(dict(log_every=50, checkpoint_every=250, sample_every=250, keep_checkpoints=1))
    config.data.update(source="world", world=ConfigDict(SCENES), world_size=4000)
    config.decoder.update(
        block_out_channels=(64, 32, 16),
        layers_per_block=(3, 2, 1),
        crop=0,  # a frame has 8x8 cells
        real_weight=0.5,  # the VAE blurs; the world's frames are at hand
    )
    config.generator_optimizer.update(
        lr=2e-3, b2=0.99, warmup_steps=50, clip_norm=1.0, schedule="cosine", decay_steps=config.steps - 50
    )
    return config

"""Distills a tiny temporal decoder from the VAE of a model folder (docs/decoder.md).

    python -m sfv_jax.train --config configs/decoder.py --workdir runs/decoder \
        --config.init=models/svd --config.data.path=data/latents
    python -m sfv_jax.convert --src runs/decoder --dst models/svd/tiny_decoder

With `--config.init=runs/sfv` the teacher is the VAE of that run's model, and the run's generator can make some of the
latents (`decoder.generated_share`). `configs/decoder.py:tiny` trains for some minutes on the procedural world; it needs
an `init`, too.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "Seraena" is the notebook of
TAESDV's author, "Turbo-VAED" the training script of arXiv 2508.09136; "choice" marks what no source states.
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "tiny"."""
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
    return defaults.finish(config, arg)

"""AnimateLCM (arXiv 2402.00769) on SVD: consistency distillation, sampled in 1 to 8 steps with `--sampler animatelcm`.

    python -m sfv_jax.train --config configs/animatelcm.py --workdir runs/animatelcm \
        --config.init=models/svd --config.data.path=data/latents

`configs/animatelcm.py:tiny` runs the same method on the procedural world, from a random start, on two CPU cores.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "release" is AnimateLCM's
code for SVD; "SF-V" marks what is as in configs/sfv.py; "choice" marks our own values (docs/decisions.md).
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "" or "tiny"."""
    config = defaults.animatelcm()
    config.steps = 50_000  # SF-V
    config.batch_size = 32  # SF-V
    config.accumulation_steps = 4  # SF-V
    config.ema_decay = 0.95  # release: the target network's
    config.generator_optimizer.update(
        name="adamw",  # release
        lr=1e-6,  # release
        b1=0.9,  # release
        b2=0.999,  # release
        weight_decay=0.0,  # choice
        warmup_steps=0,  # choice
    )
    config.animatelcm.update(
        levels=40,  # release: N, on the Karras schedule (Eq. 5 of SF-V)
        guidance_first=(1.0, 1.25, 1.5),  # release: weights of the teacher's first frame, drawn per video
        guidance_last=(2.0, 2.25, 2.5),  # release: weights of the teacher's last frame, drawn per video
        huber_c=0.001,  # release
        weight_power=0.1,  # release: w_i = (1 / (s_i - s_{i+1}))^0.1
        sample_steps=4,  # release: the demo's; for the pictures made during training
    )
    return defaults.finish(config, arg)

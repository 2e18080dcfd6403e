"""The whole method on two CPU cores: `:teacher` trains a tiny base model on the procedural world, `:sfv` distils it.

    python -m sfv_jax.quickstart --workdir runs/quickstart

runs both and compares them. Shapes of three kinds move in one of four diagonal directions, so that the first frame
leaves four futures open and their average is a blur.
"""

from sfv_jax import config as defaults

WORLD = dict(shapes=("disc", "square", "ring"), directions=4, angle_offset=45.0, speeds=(1.5,), radii=(2.5, 3.5))


def get_config(arg: str = "teacher"):
    if arg == "teacher":
        config = teacher()
    elif arg == "sfv":
        config = sfv()
    else:
        raise ValueError(f"configs/quickstart.py takes :teacher or :sfv, not :{arg}")
    config.data.world.update(WORLD)
    return config.lock()


def teacher():
    config = defaults.tiny(defaults.teacher())
    config.steps = 1100
    config.ema_decay = 0.995
    config.generator_optimizer.update(
        lr=3e-3, b2=0.99, warmup_steps=50, clip_norm=1.0, schedule="cosine", decay_steps=1050
    )
    config.teacher.update(cond_drop=0.0)
    config.update(log_every=50, checkpoint_every=275, sample_every=275)
    return config


def sfv():
    config = defaults.tiny(defaults.sfv())
    config.steps = 500
    config.ema_decay = 0.98
    config.generator_optimizer.update(lr=4e-4, warmup_steps=50)
    config.heads_optimizer.update(lr=6e-3, warmup_steps=50)
    config.sfv.recon_weight = 0.05
    config.update(log_every=20, checkpoint_every=150, sample_every=150)
    return config

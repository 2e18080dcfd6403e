"""SF-V (arXiv 2406.04324, NeurIPS 2024), section 4.1: videos of 768x448, 14 frames, 7 fps.

    python -m sfv_jax.train --config configs/sfv.py --workdir runs/sfv \
        --config.init=models/svd --config.data.path=data/latents

`configs/sfv.py:printed` has the numbers of the paper alone. Its reconstruction loss outweighs the adversarial one the
more, the larger the videos are; the default holds both in balance, and warms up the optimizers (docs/training.md).
`configs/sfv.py:tiny` and `:printed,tiny` run on the procedural world, from a random start, on two CPU cores.
`configs/sfv.py:small` trains a small model on a few clips on a CPU.

Below are the numbers of the recipe with their sources; `sfv_jax/config.py` has all fields. "paper" is SF-V; "choice"
marks what no source states (docs/decisions.md).
"""

from sfv_jax import config as defaults


def get_config(arg: str = ""):
    """Returns the config, locked; `arg` is "", "small", "printed", "tiny" or "printed,tiny"."""
    config = defaults.sfv()
    config.steps = 50_000  # paper, section 4.1
    config.batch_size = 32  # paper, section 4.1
    config.accumulation_steps = 4  # paper: 4-step accumulation on 8 GPUs
    config.ema_decay = 0.95  # paper
    config.trainable = "all"  # paper
    config.dtype = "auto"  # choice: compute dtype, bf16 but on CPU; parameters, EMA and optimizer state are fp32
    config.generator_optimizer.update(
        name="sm3",  # paper
        lr=1e-5,  # paper
        momentum=0.5,  # paper
        beta=0.999,  # paper
        max_decay=1.0,  # as in SM3: the running maximum never falls
        delay_steps=100,  # choice: the heads learn first; printed: 0
        warmup_steps=200,  # choice: SM3's first step is 16 learning rates; printed: 0
        schedule="constant",  # choice
        clip_norm=0.0,  # choice: no clipping
    )
    config.heads_optimizer.update(
        name="sm3",  # paper
        lr=1e-4,  # paper
        momentum=0.5,  # paper
        beta=0.999,  # paper
        max_decay=1.0,  # as in SM3
        delay_steps=0,
        warmup_steps=100,  # choice; printed: 0
        schedule="constant",  # choice
        clip_norm=0.0,  # choice: no clipping
    )
    config.discriminator.update(
        spatial=True,  # paper, Fig. 3
        temporal=True,  # paper, Fig. 3
        spatial_kernel=3,  # choice: with temporal kernel 9, 77 M parameters in eight heads; 9 would make 350 M
        temporal_kernel=9,  # choice
        projection_dim=64,  # choice: StyleGAN-T's
        sinusoid_dim=256,  # choice
    )
    config.sfv.update(
        # Noise levels.
        generator_levels=4,  # paper: Tg; sigma 2.269, 70.54 and 700
        probabilities=(),  # paper: equal
        discriminator_levels=1000,  # paper: Td
        p_mean=-1.0,  # paper, Eq. 7
        p_std=1.0,  # paper, Eq. 7: printed as -1; only the magnitude matters
        noise_shift=False,  # paper: none
        shared_noise=True,  # paper: one s' and one eps' for the pair of real and fake
        # Losses.
        adv_weight=1.0,  # paper, Eq. 10
        recon_weight=1.0,  # `balance` decides; printed: 0.1, lambda of Eq. 10
        recon_c=None,  # choice: 0.00054 sqrt(d), improved consistency training
        recon_reduction="rms",  # Eq. 9 over sqrt(d), so that size does not matter; printed: "video"
        balance=1.5,  # choice: adversarial over reconstruction gradient (docs/training.md); printed: 0, off
        balance_decay=0.99,  # choice
        balance_limit=1000.0,  # choice
        heads_reduction="mean",  # choice
        gan_loss="hinge",  # paper, Eq. 11
        r1_weight=1e-5,  # choice: gamma of ADD (arXiv 2311.17042)
        r1_form="gradient",  # choice: on head inputs, as in ADD
        perturbation_std=0.1,  # APT (arXiv 2501.08316), for video; only with r1_form="perturbation"
        r2_weight=0.0,  # paper: none
        r1_every=1,  # choice
        # Turns.
        generator_every=1,  # choice
        heads_every=1,  # choice
    )
    if arg == "small":  # a machine without an accelerator: a small model on a few clips
        config.update(dict(steps=60, batch_size=2, accumulation_steps=1, log_every=5, checkpoint_every=20))
        config.update(dict(sample_every=60, sample_count=2))
        config.generator_optimizer.update(delay_steps=5, warmup_steps=10)
        config.heads_optimizer.warmup_steps = 5
        arg = ""
    if arg in ("printed", "printed,tiny"):
        config.generator_optimizer.update(delay_steps=0, warmup_steps=0)  # the paper mentions none
        config.heads_optimizer.warmup_steps = 0  # the paper mentions none
        config.sfv.update(recon_weight=0.1, recon_reduction="video", balance=0.0)  # paper, Eq. 9 and 10
        arg = "tiny" if arg.endswith("tiny") else ""
    return defaults.finish(config, arg)

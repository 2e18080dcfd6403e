"""Defaults of all config fields, each with its source. Files in `configs/` start here and show the numbers of a recipe.

"paper" is SF-V (arXiv 2406.04324); "choice" marks values that no source states, with the reason in docs/decisions.md.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

try:
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder
except ImportError:
    from sfv_jax.runtime.plain_config import ConfigDict, placeholder

from sfv_jax.errors import UserError

if TYPE_CHECKING:  # commands read configs before they need JAX
    from sfv_jax.data.worlds import World
    from sfv_jax.models.codec import PatchCodec
    from sfv_jax.models.unet import UNetConfig
    from sfv_jax.models.vae import VAEConfig


def sm3(lr: float, **changes) -> ConfigDict:
    """Returns SM3 with the paper's momentum 0.5 and beta 0.999; the paper mentions no warm-up.

    `max_decay` below 1 lets the running maximum of the squared gradients fall (`optim.scale_by_sm3`).
    """
    return ConfigDict(dict(name="sm3", momentum=0.5, beta=0.999, max_decay=1.0) | schedule(lr) | changes)


def adamw(lr: float, **changes) -> ConfigDict:
    """Returns AdamW, with which SVD itself was trained (SVD paper, appendix D)."""
    return ConfigDict(dict(name="adamw", b1=0.9, b2=0.999, weight_decay=0.0) | schedule(lr) | changes)


def muon(lr: float, **changes) -> ConfigDict:
    """Returns Muon with Adam for vectors, at AdamW's learning rates (`optim.scale_by_muon`)."""
    return adamw(lr, name="muon", momentum=0.95, **changes)


def schedule(lr: float) -> dict:
    """Returns the fields of all optimizers. All but `lr` are choices: the paper gives only a learning rate."""
    return dict(
        lr=lr,
        # Updates before the warm-up in which nothing moves, but the optimizer sees the gradients. With
        # generator_every=n the generator has one update in n steps; the fields below count updates, too.
        delay_steps=0,
        warmup_steps=0,  # linear, from lr / warmup_steps; SM3's first step is 16 times lr, so try about 100
        schedule="constant",  # after the warm-up: "constant", "cosine" or "linear" (to zero)
        decay_steps=0,  # length of "cosine" and "linear"
        clip_norm=0.0,  # gradients are scaled down to at most this norm; 0: never
    )


def default() -> ConfigDict:
    """Returns the fields that all methods share."""
    return ConfigDict(
        dict(
            method="",  # module of sfv_jax.methods
            init="",  # model folder or workdir to start from; "" initializes at random
            init_weights="ema",  # which weights of a workdir: "ema" or "generator"
            encoders="",  # model folder with VAE and CLIP tower for a UNet without `init`; "": the patch codec
            seed=0,
            steps=50_000,  # paper
            batch_size=32,  # samples per optimizer step, over all devices and micro-batches; paper
            accumulation_steps=1,
            dtype="auto",  # compute dtype: fp32 on CPU, else bf16; parameters and optimizer state are fp32
            ema_decay=0.95,  # paper
            # Generator parameters to train: "all" (paper), "temporal", "spatial", or a regular expression on their
            # paths ("up_blocks|conv_out"). The others have no gradient and no optimizer state. Heads always train.
            trainable="all",
            # How the UNet is computed, for any `init`. Without `init`, any other field of UNetConfig may be added.
            unet=dict(
                remat=False,  # recompute resnets and transformer halves in the backward pass: less memory, more time
                temporal_conv="auto",  # "matmul" on CPU, else "conv"
                attention_kernel="auto",
            ),
            data=dict(
                source="latents",  # "latents": a cache made by sfv_jax.prepare; "world": the procedural world
                path="",
                split="train",
                any_encoders=False,  # accept a cache from another VAE or CLIP tower than those of `init`
                world_size=10_000,  # clips in the world's training split
                world=dict(),  # changes to worlds.World
            ),
            patch_codec=dict(),  # changes to codec.PatchCodec, for the world
            mesh=dict(data=-1, fsdp=1, spatial=1),
            log_every=50,
            checkpoint_every=1000,
            keep_checkpoints=3,  # keeps this many of the newest
            keep_every=0,  # also keeps every checkpoint whose step is a multiple of this; 0: none
            sample_every=1000,  # 0: never
            sample_count=4,
            # Alarms of a run that goes wrong (sfv_jax/training/alarms.py); 0 turns a threshold off. All are choices.
            # NaN or infinity always stops the run.
            alarms=dict(
                on_alarm="warn",  # or "stop": exit code 1, the last checkpoint stays as it is
                patience=3,  # log intervals in a row
                min_live=0.02,  # saturated discriminator: active fraction of the losses' gradient (`live/*`) below this
                max_gap=20.0,  # also saturated: fake minus real logits (`gap/*`) above this; hinge losses need 2
                min_motion=0.05,  # still frames: energy of frame differences, fake / real, in one step, below this
                # Ratio of the adversarial and the second loss's gradients at the generator's output outside this band.
                min_adv_to_rec=0.2,
                max_adv_to_rec=50.0,
                max_data_wait=0.2,  # share of time waiting for data while the accelerator is idle; only warns
            ),
            wandb_project="",  # also write to this Weights & Biases project; needs `pip install wandb`
            profile_start=0,  # jax.profiler traces the `profile_steps` steps after this one into WORKDIR/profile
            profile_steps=0,
        )
    )


def gan(**changes) -> dict:
    """Returns the fields of methods with a discriminator (`methods/adversarial.py`), with SF-V's values.

    All such methods in Table 1 of the paper have SF-V's discriminator, so they share its regularization.
    """
    fields = dict(
        adv_weight=1.0,  # paper, Eq. 10
        recon_weight=0.1,  # weight of the method's second loss; paper: lambda
        gan_loss="hinge",  # paper, Eq. 11; or "relativistic", on pairs of real and fake (R3GAN, arXiv 2501.05441)
        r1_weight=1e-5,  # choice: gamma of ADD (arXiv 2311.17042); for "perturbation", APT uses 100
        r2_weight=0.0,  # the same penalty on fakes; the paper has none
        r1_form="gradient",  # exact, on head inputs; or "perturbation" of clean latents (APT, arXiv 2501.08316)
        perturbation_std=0.1,  # APT, for video
        shared_noise=True,  # the paper writes one s' and one eps' for the pair of real and fake
        generator_every=1,  # choice: updates the generator every n-th step; other steps skip its backward pass
        heads_every=1,  # choice: updates the heads every n-th step
        # Ratio at which the gradients of the two losses at the generator's output are held, by a factor on the second
        # loss between 1 / limit and limit, from a moving average of the ratio; 0: off, as in the paper.
        balance=0.0,
        balance_decay=0.99,
        balance_limit=1000.0,
        heads_reduction="mean",  # choice: losses and penalties are means over the heads; or "sum"
        r1_every=1,  # penalties in every n-th step only, n-fold (StyleGAN2, arXiv 1912.04958)
    )
    return fields | changes


def adversarial(method: str, **fields) -> ConfigDict:
    """Returns a method with SF-V's discriminator and optimizers; `fields` make up its own section."""
    config = default()
    config.update(
        dict(
            method=method,
            backbone_init="",  # model folder or workdir with the discriminator's backbone; "": the same as `init`
            accumulation_steps=4,  # paper: batch 32 by 4-step accumulation on 8 GPUs
            generator_optimizer=sm3(1e-5),  # paper
            heads_optimizer=sm3(1e-4),  # paper
            discriminator=dict(  # paper, Fig. 3; kernels and widths: choice
                spatial=True, temporal=True, spatial_kernel=3, temporal_kernel=9, projection_dim=64, sinusoid_dim=256
            ),
        )
    )
    config[method] = ConfigDict(fields)
    return config


def sfv() -> ConfigDict:
    """Returns SF-V as we train it: `printed` with its two losses held in balance at any size of video, and warm-ups.

    docs/training.md tells what differs, and why.
    """
    config = printed()
    # Heads first, while the generator stands still; without, five steps move everything by 31 learning rates.
    config.heads_optimizer.warmup_steps = 100
    config.generator_optimizer.update(delay_steps=100, warmup_steps=200)
    config.sfv.update(recon_weight=1.0, recon_reduction="rms", balance=1.5)
    return config


def printed() -> ConfigDict:
    """Returns SF-V with all numbers of the paper."""
    return adversarial(
        "sfv",
        generator_levels=4,  # paper: Tg
        probabilities=(),  # of the generator's levels but the lowest, from the lowest up; (): equal, as in the paper
        discriminator_levels=1000,  # paper: Td
        p_mean=-1.0,  # paper, Eq. 7
        p_std=1.0,  # paper prints -1; only the magnitude matters
        noise_shift=False,  # take p_mean as that of the paper's video size and shift it for others (sfv.noise_shift)
        recon_c=placeholder(float),  # None. Choice: 0.00054 sqrt(d), improved consistency training
        recon_reduction="video",  # paper, Eq. 9 as printed
        **gan(),
    )


def ladd() -> ConfigDict:
    """Returns LADD (arXiv 2403.12015) as in SF-V's Table 1: on SVD, with SF-V's discriminator and optimizers."""
    return adversarial(
        "ladd",
        # Number of levels of Eq. 5; the highest are used, one per probability. LADD gives four probabilities, so Tg = 4
        # includes the lowest level, sigma 0.002, which teaches nothing; 5 gives four useful levels.
        generator_levels=4,
        probabilities=(0.1, 0.1, 0.1, 0.7),  # LADD, from the lowest level to the highest
        warmup_steps=500,  # LADD: steps with the probabilities below
        warmup_probabilities=(0.5, 0.5, 0.0, 0.0),  # LADD: uniform over the lower levels
        discriminator_levels=1000,  # paper: Td
        p_mean=1.0,  # LADD: logit-normal(1, 1), which in sigma is this lognormal
        p_std=1.0,
        noise_shift=False,  # as in SF-V
        # 0: real videos. n: in each step the frozen base model samples new training videos, in n guided Euler steps
        # under the batch's conditions, as LADD trains; that costs 2n forward passes.
        teacher_steps=0,
        teacher_guidance=(1.0, 3.0),  # SVD's ramp: weights of the first and the last frame
        **gan(recon_weight=0.0),
    )


def ufogen() -> ConfigDict:
    """Returns UFOGen (arXiv 2311.09257) as in SF-V's Table 1: on SVD, with SF-V's discriminator and optimizers."""
    return adversarial(
        "ufogen",
        levels=1000,  # choice: as for SF-V's discriminator; the level index is uniform
        jump=0.25,  # UFOGen: the discriminator's level is lower than the generator's by this share of all levels
        **gan(
            recon_weight=1.0,  # choice: weight of the denoising loss; UFOGen prints no number
            shared_noise=False,  # UFOGen: independent noise
            heads_every=2,  # paper: its retraining of UFOGen
        ),
    )


def animatelcm() -> ConfigDict:
    """Returns AnimateLCM (arXiv 2402.00769) as released for SVD: consistency distillation with a guided teacher."""
    config = default()
    config.update(
        dict(
            method="animatelcm",
            accumulation_steps=4,  # as SF-V
            ema_decay=0.95,  # decay of the target network
            generator_optimizer=adamw(1e-6),
            animatelcm=dict(
                levels=40,  # N, Karras
                guidance_first=(1.0, 1.25, 1.5),  # ends of the teacher's guidance ramp, drawn per video
                guidance_last=(2.0, 2.25, 2.5),
                huber_c=0.001,
                weight_power=0.1,  # w_i = (1 / (s_i - s_{i+1}))^0.1
                sampler="animatelcm",  # for the pictures made during training
                sample_steps=4,
            ),
        )
    )
    return config


def teacher() -> ConfigDict:
    """Returns EDM denoising with the numbers of SVD's last training stage (SVD paper, appendix D.4)."""
    config = default()
    config.update(
        dict(
            method="teacher",
            ema_decay=0.9999,
            generator_optimizer=adamw(3e-5),
            teacher=dict(
                p_mean=1.0,
                p_std=1.6,
                cond_drop=0.1,  # choice: SVD's rate is unpublished; InstructPix2Pix uses 0.05
                sample_steps=25,  # Euler steps for the pictures made during training
            ),
        )
    )
    return config


def vae() -> ConfigDict:
    """Returns the training of a temporal VAE on short clips; all numbers are choices."""
    config = default()
    config.update(
        dict(
            method="vae",
            ema_decay=0.999,
            generator_optimizer=adamw(1e-3, warmup_steps=100, clip_norm=1.0),
            autoencoder=dict(),  # changes to vae.VAEConfig, without `init`
            vae=dict(
                num_frames=2,  # consecutive frames of a clip; two are the fewest that train the temporal layers
                gradient_weight=1.0,  # L1 of the differences between neighboring pixels, against blurred edges
                flicker_weight=1.0,  # L1 of the differences between frames
                kl_weight=1e-3,  # KL per latent number: noise of about a percent of the latents
                ends_weight=1.0,  # of the first and last frame, which see one neighbor less, over that of the others
            ),
        )
    )
    return config


def decoder() -> ConfigDict:
    """Returns the distillation of a tiny temporal decoder; no source gives a recipe for SVD's latents.

    "Seraena" is the notebook of TAESDV's author, "Turbo-VAED" the training script of arXiv 2508.09136.
    """
    config = default()
    config.update(
        dict(
            method="decoder",
            steps=30_000,  # TAEHV's author, of a training from scratch
            batch_size=16,  # Seraena
            ema_decay=0.999,  # Turbo-VAED
            generator_optimizer=adamw(3e-4, b2=0.95, warmup_steps=100),  # Seraena; the warm-up is a choice
            decoder=dict(
                variant="tiny",  # TAESDV's layout; or "wide", ours
                block_out_channels=(),  # (): as the variant has them, with the VAE's number of levels
                layers_per_block=(),
                init="",  # a tiny decoder to start from; "": random
                crop=16,  # side of random squares, in latent cells; choice: 128 pixels of SVD. 0: whole frames
                l1_weight=1.0,  # Turbo-VAED
                flicker_weight=1.0,  # choice
                feature_weight=0.1,  # choice: the loss is a share of the teacher's mean square
                real_weight=0.0,  # choice: needs data with frames
                adv_weight=0.0,  # choice: off; about 0.01 sharpens
                r1_weight=0.01,  # choice: of the critic
                generated_share=0.0,  # share of latents that the UNet of `init` makes in one step
            ),
        )
    )
    return config


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Ends a `get_config(arg)`: returns `config`, or `tiny(config)` if `arg` is "tiny", locked against typos.

    Raises:
      UserError: if `arg` is neither "" nor "tiny".
    """
    if arg not in ("", "tiny"):
        also = {"sfv": ":small, :printed, :printed,tiny, ", "decoder": ":world, "}.get(config.method, "")
        raise UserError(f"configs/{config.method}.py takes {also}:tiny or nothing, not :{arg}")
    return (tiny(config) if arg else config).lock()


def tiny(config: ConfigDict) -> ConfigDict:
    """Returns the same method on the procedural world, with networks that train on two CPU cores."""
    codec = dict(patch=2, embed_cell=4, scaling_factor=4.0, offset=-0.6)
    config.update(
        dict(
            init="",
            steps=200,
            batch_size=8,
            accumulation_steps=1,
            dtype="float32",
            patch_codec=codec,
            unet=tiny_unet(codec, size=16),
            log_every=10,
            checkpoint_every=100,
            sample_every=100,
        )
    )
    config.data.source = "world"
    config.data.world = ConfigDict(
        dict(size=16, num_frames=6, directions=4, angle_offset=45.0, speeds=(1.5,), radii=(2.5, 3.5))
    )
    if "discriminator" in config:
        config.discriminator.update(temporal_kernel=5, projection_dim=32, sinusoid_dim=32)
        config.generator_optimizer.update(delay_steps=0, warmup_steps=0)  # 200 steps, and nothing pretrained to spoil
        config.heads_optimizer.warmup_steps = 0
    return config


def tiny_unet(codec: dict, size: int) -> dict:
    """Returns a UNet of two levels, wide enough to pass a latent cell's noise and condition through the first."""
    channels = 3 * codec["patch"] ** 2
    return dict(
        in_channels=2 * channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        num_attention_heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=3 * (size // codec["embed_cell"]) ** 2,
        addition_time_embed_dim=16,
        num_frames=6,
        norm_groups=8,  # 32 groups of one channel would erase each frame's mean color
        temporal_conv="matmul",
    )


class ConfigError(UserError):
    """Config that cannot be run; the message names the field."""


# Fields of `config.unet` that may be changed even with `init`, because they do not change the parameters.
SAME_PARAMETERS = ("remat", "temporal_conv", "attention_kernel", "num_frames")


def same_unet(unet: "UNetConfig", config: ConfigDict) -> "UNetConfig":
    """Returns `unet`, the UNet of `config.init`, with the changes of `config.unet`.

    Raises:
      ConfigError: if these would change its parameters.
    """
    wrong = sorted(set(config.unet) - set(SAME_PARAMETERS))
    if wrong and config.data.source != "world":
        raise ConfigError(f"config.unet.{wrong[0]} cannot change: config.init={config.init} decides it")
    return replace(unet, **{k: config.unet[k] for k in SAME_PARAMETERS if k in config.unet})


def plain_unet(unet: "UNetConfig") -> "UNetConfig":
    """Returns `unet` without recomputation and fused attention, so that its jaxpr shows the FLOPs of the model."""
    return replace(unet, remat=False, attention_kernel="einsum")


def world_of(config: ConfigDict) -> "World":
    """Returns the world of `config.data.world`.

    Raises:
      ConfigError: if its fields are wrong.
    """
    from sfv_jax.data.worlds import World

    return _build(World, config.data.world, "data.world")


def patch_codec_of(config: ConfigDict) -> "PatchCodec":
    """Returns the codec of `config.patch_codec`.

    Raises:
      ConfigError: if its fields are wrong.
    """
    from sfv_jax.models.codec import PatchCodec

    return _build(PatchCodec, config.patch_codec, "patch_codec")


def unet_of(config: ConfigDict) -> "UNetConfig":
    """Returns SVD's UNet with the changes of `config.unet`.

    Raises:
      ConfigError: if its fields are wrong.
    """
    from sfv_jax.models.unet import UNetConfig

    return _build(UNetConfig, config.unet, "unet")


def vae_of(config: ConfigDict) -> "VAEConfig":
    """Returns SVD's VAE with the changes of `config.autoencoder`.

    Raises:
      ConfigError: if its fields are wrong.
    """
    from sfv_jax.models.vae import VAEConfig

    return _build(VAEConfig, config.autoencoder, "autoencoder")


def _build(kind, changes: ConfigDict, name: str):
    try:
        return kind(**{k: _tuples(v) for k, v in changes.items()})
    except (TypeError, UserError) as error:
        raise ConfigError(f"config.{name}: {error}") from error


def _tuples(value):
    """Turns JSON's lists back into tuples, at every depth: the objects built from them must be hashable."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value

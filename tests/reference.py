"""Torch references for the tests: small diffusers pipelines whose every parameter is random.

Default initialisation leaves zeros, ones and equal mixing factors, behind which wrong code hides.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sfv_jax.models.clip import MEAN, STD, CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig


def unet(config: UNetConfig) -> UNetSpatioTemporalConditionModel:
    """The reference UNet of our config, random."""
    plain = len(config.block_out_channels) - 1
    return randomise(
        UNetSpatioTemporalConditionModel(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * plain + ("DownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * plain,
            block_out_channels=config.block_out_channels,
            addition_time_embed_dim=config.addition_time_embed_dim,
            projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            num_attention_heads=config.num_attention_heads,
            num_frames=config.num_frames,
        ),
        seed=1,
    )


def vae(config: VAEConfig) -> AutoencoderKLTemporalDecoder:
    """The reference VAE of our config, random."""
    return randomise(
        AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            sample_size=config.sample_size,
            scaling_factor=config.scaling_factor,
        ),
        seed=2,
    )


def image_encoder(config: CLIPConfig) -> CLIPVisionModelWithProjection:
    """The reference CLIP tower of our config, random."""
    return randomise(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                patch_size=config.patch_size,
                image_size=config.image_size,
                projection_dim=config.projection_dim,
                hidden_act="gelu",
            )
        ),
        seed=3,
    )


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills every parameter: norm scales 1 + 0.2 N, biases 0.1 N, mixing factors N, weights about N / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("mix_factor"):
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "norm" in name or "layrnorm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and "embedding.weight" not in name:
                gain = 0.5 if parameter.ndim > 2 else 1.0  # small features tell the epsilons of the norms apart
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval().requires_grad_(False)


def pipeline(unet_config: UNetConfig, vae_config: VAEConfig, clip_config: CLIPConfig) -> StableVideoDiffusionPipeline:
    """A whole pipeline of random networks with SVD's scheduler and preprocessing."""
    return StableVideoDiffusionPipeline(
        unet=unet(unet_config),
        vae=vae(vae_config),
        image_encoder=image_encoder(clip_config),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            sigma_min=0.002,
            sigma_max=700.0,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(image_mean=list(MEAN), image_std=list(STD)),
    )


def save(pipe: StableVideoDiffusionPipeline, folder: Path, *, variant: str | None = None) -> Path:
    """Writes `pipe` as its users find it; variant "fp16" converts it (in place) and names the files so."""
    if variant == "fp16":
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, variant=variant)
    return folder


def to_torch(x, dtype=torch.float64) -> torch.Tensor:
    """`x [b, t, h, w, c]` or `[b, h, w, c]` as a torch tensor with channels before height and width."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy()).to(dtype)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Inverse of `to_torch`, float64."""
    return np.moveaxis(x.double().numpy(), -3, -1)


@torch.no_grad()
def run_unet(model: UNetSpatioTemporalConditionModel, x, c_noise, context, ids) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output `[b, t, h, w, c]` and down-block outputs of the reference on our arguments, in float64."""
    model, taps = copy.deepcopy(model).double(), []
    for block in model.down_blocks:
        block.register_forward_hook(lambda module, args, result: taps.append(result[0]))
    b, t = x.shape[:2]
    as_double = [torch.from_numpy(np.array(a)).double() for a in (c_noise, context, ids)]
    out = model(to_torch(x), as_double[0], as_double[1][:, None], added_time_ids=as_double[2], return_dict=False)[0]
    return to_numpy(out), [to_numpy(tap.unflatten(0, (b, t))) for tap in taps]


@torch.no_grad()
def run_vae_encoder(model: AutoencoderKLTemporalDecoder, frames) -> np.ndarray:
    """Posterior means `[b, t, h, w, 4]` of the reference, in float64."""
    b, t = frames.shape[:2]
    mean = copy.deepcopy(model).double().encode(to_torch(frames).flatten(0, 1)).latent_dist.mode()
    return to_numpy(mean.unflatten(0, (b, t)))


@torch.no_grad()
def run_vae_decoder(model: AutoencoderKLTemporalDecoder, latents) -> np.ndarray:
    """Frames `[b, t, h, w, 3]` of the reference, in float64."""
    b, t = latents.shape[:2]
    frames = copy.deepcopy(model).double().decode(to_torch(latents).flatten(0, 1), num_frames=t).sample
    return to_numpy(frames.unflatten(0, (b, t)))


@torch.no_grad()
def run_clip(model: CLIPVisionModelWithProjection, images) -> np.ndarray:
    """Embeddings `[b, d]` of the reference on preprocessed images `[b, 224, 224, 3]`, in float64."""
    return copy.deepcopy(model).double()(to_torch(images)).image_embeds.numpy()


if __name__ == "__main__":  # python -m tests.reference FOLDER [fp16]: a small SVD-shaped folder of random weights
    tiny = pipeline(UNetConfig.tiny(num_frames=14), VAEConfig.tiny(), CLIPConfig.tiny())
    save(tiny, Path(sys.argv[1]), variant=sys.argv[2] if len(sys.argv) > 2 else None)

"""Torch references of the tests: diffusers pipelines with the random weights of `tests.support.golden`, in float64."""

import argparse
import copy
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd_pipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sfv_jax.models.clip import MEAN, STD, CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from tests.support.golden import component_weights


def unet(config: UNetConfig, *, random=True) -> UNetSpatioTemporalConditionModel:
    """Returns the reference UNet of our config with random or initial weights."""
    plain = len(config.block_out_channels) - 1
    return with_weights(
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
        component_weights("unet", config) if random else None,
    )


def vae(config: VAEConfig, *, random=True) -> AutoencoderKLTemporalDecoder:
    """Returns the reference VAE of our config with random or initial weights."""
    return with_weights(
        AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            sample_size=config.sample_size,
            scaling_factor=config.scaling_factor,
        ),
        component_weights("vae", config) if random else None,
    )


def image_encoder(config: CLIPConfig, *, random=True) -> CLIPVisionModelWithProjection:
    """Returns the reference CLIP tower of our config with random or initial weights."""
    return with_weights(
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
        component_weights("image_encoder", config) if random else None,
    )


def with_weights(model: torch.nn.Module, weights: dict[str, np.ndarray] | None) -> torch.nn.Module:
    """Loads exactly these parameters, if any, into `model`; returns it in evaluation mode."""
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval().requires_grad_(False)


def pipeline(unet_config: UNetConfig, vae_config: VAEConfig, clip_config: CLIPConfig) -> StableVideoDiffusionPipeline:
    """Returns a whole pipeline of random networks with SVD's scheduler and preprocessing."""
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
    """Writes `pipe` in the published form; variant "fp16" converts it in place and adds the suffix to the files."""
    if variant == "fp16":
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, variant=variant)
    return folder


def to_torch(x, dtype=torch.float64) -> torch.Tensor:
    """Converts `x [b, t, h, w, c]` or `[b, h, w, c]` to a torch tensor with channels before height and width."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, -3).copy()).to(dtype)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Inverts `to_torch`; returns float64."""
    return np.moveaxis(x.double().numpy(), -3, -1)


@torch.no_grad()
def unet_output(model: UNetSpatioTemporalConditionModel, x, c_noise, context, ids, dtype=torch.float64) -> np.ndarray:
    """Computes the output `[b, t, h, w, c]` of the reference on our arguments; `model` must have `dtype`."""
    c_noise, context, ids = (torch.from_numpy(np.array(a)).to(dtype) for a in (c_noise, context, ids))
    return to_numpy(model(to_torch(x, dtype), c_noise, context[:, None], added_time_ids=ids, return_dict=False)[0])


@torch.no_grad()
def encoder_output(model: AutoencoderKLTemporalDecoder, frames, dtype=torch.float64) -> np.ndarray:
    """Computes posterior means `[b, t, h, w, 4]`."""
    mean = model.encode(to_torch(frames, dtype).flatten(0, 1)).latent_dist.mode()
    return to_numpy(mean.unflatten(0, frames.shape[:2]))


@torch.no_grad()
def decoder_output(model: AutoencoderKLTemporalDecoder, latents, dtype=torch.float64) -> np.ndarray:
    """Computes frames `[b, t, h, w, 3]`."""
    frames = model.decode(to_torch(latents, dtype).flatten(0, 1), num_frames=latents.shape[1]).sample
    return to_numpy(frames.unflatten(0, latents.shape[:2]))


@torch.no_grad()
def clip_output(model: CLIPVisionModelWithProjection, images, dtype=torch.float64) -> np.ndarray:
    """Computes embeddings `[b, d]` of preprocessed images `[b, 224, 224, 3]`."""
    return model(to_torch(images, dtype)).image_embeds.double().numpy()


def run_unet(model: UNetSpatioTemporalConditionModel, *inputs) -> tuple[np.ndarray, list[np.ndarray]]:
    """Computes `unet_output` and the outputs of the down blocks in float64."""
    model, taps = copy.deepcopy(model).double(), []
    for block in model.down_blocks:
        block.register_forward_hook(lambda module, args, result: taps.append(result[0]))
    out = unet_output(model, *inputs)
    return out, [to_numpy(tap.unflatten(0, out.shape[:2])) for tap in taps]


def run(output, model: torch.nn.Module, *inputs) -> np.ndarray:
    """Runs one of the functions above in float64 on a copy of `model`."""
    return output(copy.deepcopy(model).double(), *inputs)


def run_scheduler(pipe: StableVideoDiffusionPipeline, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes noise levels `[steps + 1]` and UNet inputs `[steps]` of SVD's scheduler (float32 inside)."""
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double().numpy(), scheduler.timesteps.double().numpy()


def run_resize(image: np.ndarray) -> np.ndarray:
    """Resizes `image [h, w]` to 224 x 224 with the pipeline's filter for CLIP (float32 coordinates inside)."""
    wide = torch.from_numpy(image)[None, None].double()
    return svd_pipeline._resize_with_antialiasing(wide, (224, 224))[0, 0].double().numpy()


def run_preprocess(pipe: StableVideoDiffusionPipeline, images: np.ndarray) -> np.ndarray:
    """Computes CLIP's input `[b, 224, 224, 3]` from `images [b, h, w, 3]` in [0, 1]."""
    signed = to_torch(images) * 2 - 1
    resized = (svd_pipeline._resize_with_antialiasing(signed, (224, 224)) + 1) / 2
    return to_numpy(
        pipe.feature_extractor(
            resized, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=True, return_tensors="pt"
        ).pixel_values
    )


@torch.no_grad()
def run_pipeline(pipe, images, start, pixel_noise, ids, steps: int, guidance: tuple | None) -> np.ndarray:
    """Computes latents `[b, t, h, w, 4]` of the whole pipeline with float64 networks and the given noise.

    The scheduler rounds its input latents to float32; the rest of its step is float64.
    """
    parts = copy.deepcopy(pipe.components)
    pipe = StableVideoDiffusionPipeline(
        **{k: v.double() if isinstance(v, torch.nn.Module) else v for k, v in parts.items()}
    )
    pipe.set_progress_bar_config(disable=True)
    low, high = guidance or (1.0, 1.0)
    drawn = mock.patch.object(svd_pipeline, "randn_tensor", lambda *args, **kw: to_torch(pixel_noise, torch.float32))
    with drawn:
        latents = pipe(
            [Image.fromarray(image) for image in images],
            height=pixel_noise.shape[1],
            width=pixel_noise.shape[2],
            num_frames=start.shape[1],
            num_inference_steps=steps,
            min_guidance_scale=low,
            max_guidance_scale=high,
            fps=ids[0] + 1,
            motion_bucket_id=ids[1],
            noise_aug_strength=ids[2],
            latents=to_torch(start),
            output_type="latent",
        ).frames
    return to_numpy(latents)


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (diffusers, transformers, torch, np)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.reference",
        description="Writes a diffusers folder of SVD's kind, small and random.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("variant", nargs="?", choices=["fp16"], help="half precision, in files named so")
    asked = parser.parse_args()
    save(
        pipeline(UNetConfig.tiny(num_frames=14), VAEConfig.tiny(), CLIPConfig.tiny()),
        asked.folder,
        variant=asked.variant,
    )
    print(f"wrote {asked.folder}")

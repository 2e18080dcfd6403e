"""Comparison with diffusers: the same networks in torch and in JAX, timed in turns in one process."""

import importlib
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.codec import SVDCodec
from sfv_jax.models.decoders import decode_pixels, device_memory
from sfv_jax.models.networks import DTYPES
from sfv_jax.models.unet import UNet
from sfv_jax.models.vae import TemporalVAE
from sfv_jax.performance import random_arrays, timing
from sfv_jax.performance.programs import Sizes
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import save_component
from sfv_jax.weights.pipeline import FEATURE_EXTRACTOR, SCHEDULER


def against_diffusers(
    sizes: Sizes,
    size: tuple[int, int],
    batch: int,
    dtype: str,
    repeats: int,
    backward: bool,
    done: Callable[[str, dict], None] = lambda stage, times: None,
) -> dict:
    """Times UNet, VAE decoder and whole pipeline of diffusers and of this package, on the same weights and inputs.

    Weights and inputs are random. Prints the ratios. On a GPU diffusers is timed both as it is and through
    `torch.compile`; on CPU only as it is.

    Args:
      sizes: configs of the networks; the VAE and the CLIP tower must be there.
      size: (height, width) of the video in pixels.
      batch: videos per call.
      dtype: compute dtype, a name of `networks.DTYPES`.
      repeats: timed calls.
      backward: times the UNet alone instead: its forward pass, and its forward and backward pass.
      done: called with each stage and its times as soon as they are measured.

    Returns:
      `{stage: {"sfv_jax": seconds per call, "diffusers": seconds per call, ..., "difference": d}}`; d is the largest
      absolute difference of the two results over the standard deviation of diffusers' result.

    Raises:
      ConfigError: if torch or diffusers is not installed.
    """
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot import torch and diffusers: pip install torch diffusers ({reason})") from error
    gpu = torch.cuda.is_available()
    configs: dict[str, Any] = {"unet": sizes.unet}
    if not backward:
        configs["vae"], configs["image_encoder"] = sizes.encoders
    params, theirs, result = {}, {}, {}

    def compare(stage: str, calls: dict[str, Callable], plain, compiled: Callable = torch.compile) -> None:
        peer = calls.pop("diffusers")
        calls["diffusers"] = partial(peer, plain)
        if gpu:
            calls["torch.compile"] = partial(peer, compiled(plain))
        result[stage] = _in_turns(stage, calls, repeats)
        done(stage, result[stage])
        jax.clear_caches()

    for name, config in configs.items():
        params[name], theirs[name] = _both(name, config, dtype, "cuda" if gpu else "cpu")
    given = sizes, size, batch, dtype, params, theirs
    compare("UNet", _unet(*given, backward=False), theirs["unet"])
    if backward:
        compare("UNet, forward and backward", _unet(*given, backward=True), theirs["unet"])
        return result
    compare("VAE decoder", _decoder(*given), theirs["vae"].decode)
    compare("image to frames", _whole(*given), _pipeline(theirs), _compiled_pipeline)
    return result


def _both(component: str, config, dtype: str, device: str) -> tuple:
    """Returns (our fp32 parameters, diffusers' network in `dtype` on `device`) with the same random weights."""
    import torch

    kind = COMPONENTS[component]
    params = random_arrays.random_arrays(_placed(tree.abstract(kind.module, config)[1]))
    theirs = getattr(importlib.import_module(kind.library), kind.class_name)
    with tempfile.TemporaryDirectory() as folder:
        save_component(folder, component, params, config)
        option = {"diffusers": "torch_dtype", "transformers": "dtype"}[kind.library]
        options = {option: getattr(torch, dtype), "low_cpu_mem_usage": False}
        return params, theirs.from_pretrained(folder, **options).to(device).eval()


def _in_turns(stage: str, calls: dict[str, Callable], repeats: int) -> dict:
    ours, reference = (np.asarray(calls[name](), np.float32) for name in ("sfv_jax", "diffusers"))
    difference = float(np.abs(ours - reference).max() / reference.std())
    times = timing.alternate(calls, repeats)
    _show(stage, times, difference)
    return {name: timed.seconds for name, timed in times.items()} | {"difference": difference}


def _show(stage: str, times: dict[str, timing.Timing], difference: float) -> None:
    print(f"\n{stage}: largest difference {difference:.1e} of the deviation")
    for name, timed in times.items():
        ratio = "" if name == "sfv_jax" else f", {timed.median / times['sfv_jax'].median:.2f} times ours"
        print(f"  {name}: {timed}{ratio}", flush=True)


def _placed(abstract):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding), abstract)


def _unet(sizes: Sizes, size, batch, dtype, params, theirs, *, backward: bool) -> dict[str, Callable]:
    """Returns calls that compute the UNet's output, channels last, or the gradient of its mean square in conv_in.

    The call of diffusers takes the network to run: that of `theirs`, or a compiled form of it.
    """
    import torch

    config = sizes.unet
    graph, _ = tree.abstract(UNet, config, dtype=DTYPES[dtype])
    shape = (batch, config.num_frames, *(side // sizes.downscale for side in size), config.in_channels)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    c_noise, context = (
        np.full(batch, 0.3, np.float32),
        rng.standard_normal((batch, config.cross_attention_dim), np.float32),
    )
    ids = np.tile(np.array([6, 127, 0.02], np.float32), (batch, 1))
    forward = lambda params, *inputs: tree.build(graph, params)(*inputs)  # noqa: E731
    loss = lambda params, *inputs: jnp.mean(jnp.square(forward(params, *inputs).astype(jnp.float32)))  # noqa: E731
    ours = jax.jit(jax.grad(loss) if backward else forward)
    params, theirs = params["unet"], theirs["unet"]
    stored = params if backward else _cast(params, dtype)
    inputs = tuple(map(jnp.asarray, (x, c_noise, context, ids)))

    def mine():
        out = jax.block_until_ready(ours(stored, *inputs))
        return out["conv_in"]["kernel"] if backward else out

    half = next(theirs.parameters())
    to = lambda a: torch.from_numpy(a).to(half.device, half.dtype)  # noqa: E731
    given = to(np.moveaxis(x, -1, 2).copy()), to(c_noise), to(context)[:, None]

    def peer(network):
        with torch.set_grad_enabled(backward):
            out = network(*given, added_time_ids=to(ids), return_dict=False)[0]
            if backward:
                theirs.zero_grad(set_to_none=True)
                out.float().square().mean().backward()
                out = theirs.conv_in.weight.grad.permute(2, 3, 1, 0)
            return _finished(out if backward else out.permute(0, 1, 3, 4, 2))

    return {"sfv_jax": mine, "diffusers": peer}


def _decoder(sizes: Sizes, size, batch, dtype, params, theirs) -> dict[str, Callable]:
    """Returns calls that compute frames `[b * t, h, w, 3]`; the call of diffusers takes the decoder to run."""
    import torch

    (config, _), frames = sizes.encoders, sizes.unet.num_frames
    shape = (batch, frames, *(side // config.downscale for side in size), config.latent_channels)
    pixels = decode_pixels(config, shape, dtype, device_memory())  # as the sampler decodes
    graph, _ = tree.abstract(TemporalVAE, replace(config, decode_pixels=pixels), dtype=DTYPES[dtype])
    params, theirs = params["vae"], theirs["vae"]
    decode = jax.jit(lambda params, z: tree.build(graph, params).decode(z))
    z = np.random.default_rng(0).standard_normal(shape, np.float32)
    latents = jnp.asarray(z)
    given = torch.from_numpy(np.moveaxis(z.reshape(-1, *shape[2:]), -1, 1).copy())
    half = next(theirs.parameters())
    given = given.to(half.device, half.dtype)

    @torch.no_grad()
    def peer(decoder):
        return _finished(decoder(given, num_frames=frames, return_dict=False)[0].permute(0, 2, 3, 1))

    def mine():
        return jax.block_until_ready(decode(params, latents)).reshape(-1, *size, 3)

    return {"sfv_jax": mine, "diffusers": peer}


def _whole(sizes: Sizes, size, batch, dtype, params, theirs) -> dict[str, Callable]:
    """Returns calls from images to frames `[b, t, h, w, 3]`, both in host memory, in one step from the same noise."""
    import torch
    from PIL import Image

    codec = SVDCodec(*sizes.encoders, params, decode_dtype=DTYPES[dtype])
    sampler = Sampler(sizes.unet, _cast(params["unet"], dtype), codec, dtype)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (batch, *size, 3), np.uint8))
    noise = rng.standard_normal((batch, *sampler.latent_shape(size)), np.float32)
    half = next(theirs["unet"].parameters())
    start = torch.from_numpy(np.moveaxis(noise, -1, 2).copy()).to(half.device, half.dtype)
    options: dict[str, Any] = dict(height=size[0], width=size[1], num_frames=sizes.unet.num_frames, fps=7)
    options |= dict(motion_bucket_id=127, noise_aug_strength=0.0, decode_chunk_size=sizes.unet.num_frames)
    guidance = dict(min_guidance_scale=1.0, max_guidance_scale=1.0)
    pictures = [Image.fromarray(image) for image in images]

    def mine():
        return sampler(images, noise=jnp.asarray(noise), **options) / np.float32(255)

    def peer(pipe):
        return pipe(pictures, num_inference_steps=1, latents=start, output_type="np", **guidance, **options).frames

    return {"sfv_jax": mine, "diffusers": peer}


def _pipeline(components: dict):
    """Builds a StableVideoDiffusionPipeline of these networks, with SVD's scheduler."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    settings: dict[str, Any] = {k: v for k, v in FEATURE_EXTRACTOR.items() if not k.endswith("_type")}
    scheduler: Any = EulerDiscreteScheduler.from_config(SCHEDULER)
    extractor = CLIPImageProcessor(**settings)
    pipe: Any = StableVideoDiffusionPipeline(scheduler=scheduler, feature_extractor=extractor, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compiled_pipeline(plain):
    """Returns `plain` with UNet and decoder passed through `torch.compile`, as in diffusers' documentation."""
    import torch

    vae = copy(plain.vae)
    vae.decode = torch.compile(vae.decode)
    return _pipeline(dict(unet=torch.compile(plain.unet), vae=vae, image_encoder=plain.image_encoder))


def _cast(params, dtype: str):
    return jax.tree.map(lambda p: p.astype(DTYPES[dtype]), params)


def _finished(out):
    """Waits for the device and returns `out` as float32 for numpy."""
    import torch

    if out.is_cuda:
        torch.cuda.synchronize()
        return _Lazy(out)
    return out.detach().float().numpy()


class _Lazy:
    """Tensor on a GPU that numpy copies to the host later, outside the timed call."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __array__(self, dtype=None, copy=None):
        return self.tensor.detach().float().cpu().numpy()

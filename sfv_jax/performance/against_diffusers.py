"""The same networks in torch, by diffusers: the peer that the benchmark measures against, in turns, in one process."""

import importlib
import tempfile
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.codec import SVDCodec, decode_pixels, device_memory
from sfv_jax.models.networks import DTYPES
from sfv_jax.models.unet import UNet
from sfv_jax.models.vae import TemporalVAE
from sfv_jax.performance import random_arrays, timing
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import save_component
from sfv_jax.weights.pipeline import FEATURE_EXTRACTOR, SCHEDULER


def against_diffusers(sizes, size: tuple[int, int], batch: int, dtype: str, repeats: int, backward: bool) -> dict:
    """Times diffusers' UNet, VAE decoder and whole pipeline and ours on the same random weights and inputs.

    Prints the ratios. On a GPU diffusers is timed as it is and through `torch.compile`; on CPU as it is.

    Args:
      sizes, size: networks (`programs.Sizes`) and (height, width) of the video in pixels.
      backward: the UNet's forward pass, and its forward and backward pass, instead.
    Returns:
      `{stage: {"sfv_jax": seconds, "diffusers": seconds, ..., "difference": largest, relative to the deviation}}`.
    Raises:
      ConfigError: if torch or diffusers is not installed.
    """
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise ConfigError("--compare diffusers needs torch and diffusers: pip install torch diffusers") from error
    gpu = torch.cuda.is_available()
    configs = {"unet": sizes.unet} if backward else {"unet": sizes.unet, "vae": sizes.vae, "image_encoder": sizes.clip}
    params, theirs, result = {}, {}, {}

    def compare(stage: str, calls: dict[str, Callable], plain, compiled: Callable = torch.compile) -> None:
        peer = calls.pop("diffusers")
        calls["diffusers"] = partial(peer, plain)
        if gpu:
            calls["torch.compile"] = partial(peer, compiled(plain))
        result[stage] = _in_turns(stage, calls, repeats)
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
    """(our fp32 parameters, their network in `dtype` on `device`) of a component, random and the same."""
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


def _unet(sizes, size, batch, dtype, params, theirs, *, backward: bool) -> dict[str, Callable]:
    """Calls that return the output, or the gradient of conv_in of the mean square of the output, channels last.

    The peer's takes the network to call: `theirs`, or a compiled form of it.
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
    ids = np.tile(np.float32([6, 127, 0.02]), (batch, 1))
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


def _decoder(sizes, size, batch, dtype, params, theirs) -> dict[str, Callable]:
    """Calls that return decoded frames `[b * t, h, w, 3]`; the peer's takes the decoder to call."""
    import torch

    config, frames = sizes.vae, sizes.unet.num_frames
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


def _whole(sizes, size, batch, dtype, params, theirs) -> dict[str, Callable]:
    """Calls from images in host memory to frames there, `[b, t, h, w, 3]`, in one step with the same noise."""
    import torch
    from PIL import Image

    codec = SVDCodec(sizes.vae, sizes.clip, params, decode_dtype=DTYPES[dtype])
    sampler = Sampler(sizes.unet, _cast(params["unet"], dtype), codec, dtype)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (batch, *size, 3), np.uint8))
    noise = rng.standard_normal((batch, *sampler.latent_shape(size)), np.float32)
    half = next(theirs["unet"].parameters())
    start = torch.from_numpy(np.moveaxis(noise, -1, 2).copy()).to(half.device, half.dtype)
    options = dict(height=size[0], width=size[1], num_frames=sizes.unet.num_frames, fps=7, motion_bucket_id=127)
    options |= dict(noise_aug_strength=0.0, decode_chunk_size=sizes.unet.num_frames)
    guidance = dict(min_guidance_scale=1.0, max_guidance_scale=1.0)
    pictures = [Image.fromarray(image) for image in images]

    def mine():
        return sampler(images, noise=jnp.asarray(noise), **options) / np.float32(255)

    def peer(pipe):
        return pipe(pictures, num_inference_steps=1, latents=start, output_type="np", **guidance, **options).frames

    return {"sfv_jax": mine, "diffusers": peer}


def _pipeline(components: dict):
    """A StableVideoDiffusionPipeline of these networks, with SVD's scheduler."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    settings = {k: v for k, v in FEATURE_EXTRACTOR.items() if not k.endswith("_type")}
    pipe = StableVideoDiffusionPipeline(
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER),
        feature_extractor=CLIPImageProcessor(**settings),
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compiled_pipeline(plain):
    """`plain` with UNet and decoder through `torch.compile`, as diffusers' documentation does it."""
    import torch

    vae = copy(plain.vae)
    vae.decode = torch.compile(vae.decode)
    return _pipeline(dict(unet=torch.compile(plain.unet), vae=vae, image_encoder=plain.image_encoder))


def _cast(params, dtype: str):
    return jax.tree.map(lambda p: p.astype(DTYPES[dtype]), params)


def _finished(out):
    """`out` in float32 on the host's side of things, once the device is done."""
    import torch

    if out.is_cuda:
        torch.cuda.synchronize()
        return _Lazy(out)
    return out.detach().float().numpy()


class _Lazy:
    """A result on a GPU that numpy may fetch later, outside of the time that is taken."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __array__(self, dtype=None, copy=None):
        return self.tensor.detach().float().cpu().numpy()

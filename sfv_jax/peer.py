"""The same networks in torch, by diffusers: the peer that the benchmark measures against, in turns, in one process."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax import timing
from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.codec import decode_pixels, device_memory
from sfv_jax.models.unet import UNet
from sfv_jax.models.vae import TemporalVAE
from sfv_jax.state import DTYPES
from sfv_jax.weights.diffusers import save_component

CLASSES = {"unet": UNet, "vae": TemporalVAE}


def against_diffusers(sizes, size: tuple[int, int], batch: int, dtype: str, repeats: int, backward: bool) -> dict:
    """Times diffusers' UNet and VAE decoder and ours on the same random weights and inputs, and prints the ratios.

    On a GPU diffusers is timed as it is and through `torch.compile`; on CPU as it is.

    Args:
      sizes, size: networks (`programs.Sizes`) and (height, width) of the video in pixels.
      backward: the UNet's forward pass, and its forward and backward pass, instead of the UNet and the decoder.
    Returns:
      `{stage: {"sfv_jax": seconds, "diffusers": seconds, ..., "difference": largest, relative to the deviation}}`.
    Raises:
      ConfigError: if torch or diffusers is not installed.
    """
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ConfigError("--compare diffusers needs torch and diffusers: pip install torch diffusers") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {"unet": diffusers.UNetSpatioTemporalConditionModel, "vae": diffusers.AutoencoderKLTemporalDecoder}
    result = {}
    for component in ("unet",) if backward else ("unet", "vae"):
        config = getattr(sizes, component)
        params = timing.random_arrays(_placed(tree.abstract(CLASSES[component], config)[1]))
        with tempfile.TemporaryDirectory() as folder:
            save_component(Path(folder) / component, component, params, config)
            options = dict(low_cpu_mem_usage=False, torch_dtype=getattr(torch, dtype))
            theirs = made[component].from_pretrained(Path(folder) / component, **options).to(device)
        given = sizes, size, batch, dtype, params, theirs
        if component == "vae":
            stages = {"VAE decoder": (_decoder(*given), theirs.decode)}
        else:
            stages = {"UNet": (_unet(*given, backward=False), theirs)}
        if backward:
            stages["UNet, forward and backward"] = _unet(*given, backward=True), theirs
        for stage, (calls, plain) in stages.items():
            peer = calls.pop("diffusers")
            calls["diffusers"] = partial(peer, plain)
            if device == "cuda":
                calls["torch.compile"] = partial(peer, torch.compile(plain))
            result[stage] = _in_turns(stage, calls, repeats)
        jax.clear_caches()
    return result


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
    stored = params if backward else jax.tree.map(lambda p: p.astype(DTYPES[dtype]), params)
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

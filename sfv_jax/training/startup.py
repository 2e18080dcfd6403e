"""What a run says before its first step: devices, networks, data, and the choices made for the platform."""

import math
from collections import Counter

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sfv_jax.models.layers import temporal_form


def describe_devices(config: ConfigDict, mesh: Mesh) -> str:
    """Returns a line on the devices of a run and the fields that were chosen for them."""
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    mesh_ = "x".join(map(str, mesh.devices.shape))
    section = config.autoencoder if "autoencoder" in config else config.unet
    form = temporal_form(section.get("temporal_conv", "auto"))
    form = {"conv": "one convolution", "matmul": "matrix products"}[form]
    shape = f", mesh {mesh_} ({', '.join(mesh.axis_names)})" if mesh.size > 1 else ""
    return f"devices: {devices}{hosts}{shape}; computing in {config.dtype}, temporal convolutions as {form}"


def describe_job(config: ConfigDict, state: dict, source) -> str:
    """Returns lines on the networks, the data and the batches of a run.

    Args:
      config: config of the run.
      state: abstract state of training.
      source: the examples.
    """
    start = config.init or "a random start"
    heads = f", heads {_count(state['heads'])}" if "heads" in state else ""
    some = "" if config.trainable == "all" else f", trainable: {config.trainable}"
    example = source[0]
    name = next(name for name in ("latents", "frames") if name in example)
    frames, *shape = example[name].shape
    kind = "latents" if name == "latents" else "pixels"
    parts = config.accumulation_steps
    micro = f", accumulated over {parts} micro-batches" if parts > 1 else ""
    return (
        f"{config.method} from {start}: {_count(state['generator'])} parameters{heads}{some}\n"
        f"data: {len(source)} clips of {frames} frames, {kind} {'x'.join(map(str, shape))}; "
        f"{config.steps} steps of {config.batch_size} clips{micro}"
    )


def _count(params) -> str:
    """Returns the number of parameters of a tree, such as "1.52 B"."""
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)

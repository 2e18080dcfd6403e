"""Time of a UNet's forward pass, and of forward and backward, ours against diffusers: same weights, inputs and CPU.

    python -m tests.forward_ratio [small|mid]

Not a test: the machine's noise would decide it. Runs alternate; medians, extremes and ratios are printed. The backward
pass is that of the mean square of the output with respect to all parameters.
"""

import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sfv_jax.models import tree
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.weights.diffusers import load_component
from tests import reference

CHANNELS = {"small": (64, 128, 256, 256), "mid": (128, 256, 512, 512)}
SHAPE, RUNS = (1, 8, 32, 48), 5


def config(size: str) -> UNetConfig:
    channels = CHANNELS[size]
    return UNetConfig(
        block_out_channels=channels,
        num_attention_heads=tuple(c // 64 for c in channels),
        cross_attention_dim=64,
        addition_time_embed_dim=64,
        temporal_conv="matmul",
    )


def calls(size: str) -> dict[str, dict]:
    """`{"forward": {"diffusers": call, "sfv_jax": call}, "forward and backward": ...}`; a call waits for its result."""
    model = reference.unet(config(size)).requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params = jax.device_put(load_component(folder, "unet")[0])
    graph, _ = tree.abstract(UNet, config(size))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*SHAPE, 8), np.float32)
    c_noise, context = np.float32([0.3]), rng.standard_normal((1, 64), np.float32)
    ids = np.float32([[6, 127, 0.02]])
    inputs = (reference.to_torch(x, torch.float32), torch.from_numpy(c_noise), torch.from_numpy(context)[:, None])

    def ours(params):
        return tree.build(graph, params)(x, c_noise, context, ids)

    def theirs():
        return model(*inputs, added_time_ids=torch.from_numpy(ids), return_dict=False)[0]

    def train():
        model.zero_grad()
        theirs().square().mean().backward()

    forward, gradient = jax.jit(ours), jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(ours(params)))))
    difference = np.abs(np.asarray(forward(params)) - reference.to_numpy(theirs().detach())).max()
    print(f"{size}: largest difference {difference:.1e}")
    return {
        "forward": {
            "diffusers": torch.no_grad()(theirs),
            "sfv_jax": lambda: jax.block_until_ready(forward(params)),
        },
        "forward and backward": {
            "diffusers": train,
            "sfv_jax": lambda: jax.block_until_ready(gradient(params)),
        },
    }


def main(size: str) -> None:
    for what, pair in calls(size).items():
        seconds = {name: [] for name in pair}
        for n in range(RUNS + 1):
            for name, call in pair.items():
                began = time.perf_counter()
                call()
                if n:  # the first compiles
                    seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            print(f"{what}: {name:10} median {np.median(times):.3f} s  (min {min(times):.3f}, max {max(times):.3f})")
        median, least = (
            f(seconds["diffusers"]) / f(seconds["sfv_jax"]) for f in (lambda times: float(np.median(times)), min)
        )
        print(f"{what}: diffusers / sfv_jax = {median:.2f} by medians, {least:.2f} by minima", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["small"])

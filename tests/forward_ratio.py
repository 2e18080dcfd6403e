"""Time of one UNet forward, ours against diffusers, same weights and inputs, in one run on one CPU.

    python -m tests.forward_ratio

Not a test: the machine's noise would decide it. Runs alternate; medians and their ratio are printed.
"""

import tempfile
import time

import jax
import numpy as np
import torch

from sfv_jax.models import tree
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.weights.diffusers import load_component
from tests import reference

CONFIG = UNetConfig(
    block_out_channels=(64, 128, 256, 256),
    num_attention_heads=(1, 2, 4, 4),
    cross_attention_dim=64,
    addition_time_embed_dim=64,
    temporal_conv="matmul",
)
SHAPE, RUNS = (1, 8, 32, 48), 7


def main() -> None:
    model = reference.unet(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        params, _, _ = load_component(folder, "unet")
    graph, _ = tree.abstract(UNet, CONFIG)
    ours = jax.jit(lambda params, *inputs: tree.build(graph, params)(*inputs))

    rng = np.random.default_rng(0)
    x = rng.standard_normal((*SHAPE, 8), np.float32)
    c_noise, context = np.float32([0.3]), rng.standard_normal((1, 64), np.float32)
    ids = np.float32([[6, 127, 0.02]])
    torch_inputs = (reference.to_torch(x, torch.float32), torch.from_numpy(c_noise), torch.from_numpy(context)[:, None])

    @torch.no_grad()
    def theirs():
        return model(*torch_inputs, added_time_ids=torch.from_numpy(ids), return_dict=False)[0]

    params = jax.device_put(params)
    difference = np.abs(np.asarray(ours(params, x, c_noise, context, ids)) - reference.to_numpy(theirs())).max()
    seconds = {"diffusers": [], "sfv_jax": []}
    for _ in range(RUNS):
        for name, call in (("diffusers", theirs), ("sfv_jax", lambda: ours(params, x, c_noise, context, ids))):
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:10} median {medians[name]:.3f} s  (min {min(times):.3f}, max {max(times):.3f})")
    print(f"largest difference {difference:.1e}; sfv_jax / diffusers = {medians['sfv_jax'] / medians['diffusers']:.2f}")


if __name__ == "__main__":
    main()

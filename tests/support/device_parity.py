"""Networks and the gradient of the train step on the device at hand, against stored files.

    python -m tests.support.device_parity

prints a line per comparison; `--write` stores the gradient anew, from the CPU. Differences are in units of the expected
output's standard deviation. In fp32 products run at the highest precision, so the bound is that of rounding; in bf16 it
is one that a sound program keeps with room to spare (eight bits of mantissa through some dozens of layers: 0.06 were
seen, and an error in a network is of the order of 1).
"""

import sys
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax import config as configs
from sfv_jax.methods import sfv
from sfv_jax.models import tree
from sfv_jax.models.unet import UNetConfig
from sfv_jax.weights.components import COMPONENTS
from tests.support import golden

BOUNDS = {"float32": ("max", 2e-4), "bfloat16": ("rms", 0.15)}  # of the largest or the root mean square difference
NETWORKS = {  # {name in the golden file: (component, call, its inputs)}
    "unet": ("unet", lambda unet, *inputs: unet(*inputs), golden.unet_inputs),
    "encoder": ("vae", lambda vae, x: vae.encode(x), golden.encoder_inputs),
    "decoder": ("vae", lambda vae, z: vae.decode(z), golden.decoder_inputs),
    "clip": ("image_encoder", lambda tower, x: tower(x), golden.clip_inputs),
}
GRADIENT = Path(__file__).parents[1] / "recorded" / "gradient.npz"


def compare(names: Collection[str] = tuple(NETWORKS)) -> Iterator[tuple[str, dict]]:
    """Yields `(name, {"max", "rms", "bound", "sound"})` of each comparison.

    Args:
      names: networks to compare, in fp32 and bf16; the gradient is always compared.
    """
    golden.check_weights()
    stored = golden.load("networks")
    for dtype in BOUNDS:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            for name in names:
                component, call, inputs = NETWORKS[name]
                found = jax.jit(partial(call, network(component, dtype)))(*inputs())
                yield f"{name} {dtype}", figures(found, stored[name], dtype)
    with np.load(GRADIENT) as file:
        for name, found in gradients().items():
            yield f"{name} float32", figures(found, file[name], "float32")


def network(component: str, dtype: str):
    """Returns a network with the random weights of the golden files and compute dtype `dtype`."""
    graph, _ = tree.abstract(COMPONENTS[component].module, golden.CONFIGS[component], dtype=jnp.dtype(dtype))
    return tree.build(graph, jax.tree.map(jnp.asarray, golden.component_params(component)))


def gradients() -> dict[str, np.ndarray]:
    """Returns a random projection of each array's gradient in one SF-V step, for generator and heads, in fp32."""
    unet = UNetConfig(
        block_out_channels=(16,),
        num_attention_heads=(2,),
        layers_per_block=1,
        cross_attention_dim=12,
        addition_time_embed_dim=8,
        num_frames=2,
        norm_groups=4,
    )
    config = configs.printed()
    config.update(dict(dtype="float32", batch_size=2))
    config.discriminator.update(temporal_kernel=3, projection_dim=4, sinusoid_dim=8)
    networks = sfv.make_networks(unet, config)
    weights = jax.tree.map(lambda x: 0.1 * golden.noise(x.size, *x.shape), networks.abstract)
    batch = {
        "latents": golden.noise(0, 2, 2, 8, 8, unet.out_channels),
        "cond_latent": golden.noise(1, 2, 8, 8, unet.in_channels - unet.out_channels),
        "image_embed": golden.noise(2, 2, unet.cross_attention_dim),
        "ids": np.array([[6, 127, 0.02], [6, 40, 0.1]], np.float32),
    }
    with jax.default_matmul_precision("highest"):
        made = jax.jit(sfv.make_gradients(networks, config))(
            weights["generator"], weights["heads"], {"backbone": weights["backbone"]}, batch, jax.random.key(0), 0
        )
    generator, heads, _ = jax.device_get(made)
    return {"gradient of the generator": projections(generator), "gradient of the heads": projections(heads)}


def projections(gradient) -> np.ndarray:
    """Returns the product of each array of `gradient` with a random one."""
    return np.array([np.vdot(golden.noise(x.size, *x.shape), x) for x in jax.tree.leaves(gradient)])


def figures(found, expected: np.ndarray, dtype: str) -> dict:
    """Returns the largest and the root mean square difference, the bound of one of them, and whether it is kept."""
    largest, rms = golden.error(found, np.asarray(expected, np.float64))
    kind, bound = BOUNDS[dtype]
    return {
        "max": largest,
        "rms": rms,
        "bound": f"{kind} {bound}",
        "sound": {"max": largest, "rms": rms}[kind] <= bound,
    }


def main() -> None:
    if "--write" in sys.argv:
        jax.config.update("jax_platforms", "cpu")
        np.savez_compressed(GRADIENT, versions=f"jax {jax.__version__}, CPU", **gradients())
    for name, found in compare():
        print(f"{name:35} max {found['max']:.1e}  rms {found['rms']:.1e}  bound {found['bound']}  {found['sound']}")


if __name__ == "__main__":
    main()

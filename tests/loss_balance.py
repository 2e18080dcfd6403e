"""How the balance of SF-V's two losses depends on the size of a video: a table over a ladder of sizes.

    python -m tests.loss_balance [--sizes 768,301056] [--forms printed] [--longest 19712] [--plot docs/loss_balance.svg]

A small UNet of two levels is trained by SF-V on moving shapes whose latents have the paper's sizes, up to 14 frames of
56x96 cells and 4 channels. Each line gives the ratio of the gradients of both losses at the generator's output, before
the first step and as the mean of the last ten, for the paper's reconstruction loss, the one divided by the root of the
size, and the balance of the default recipe. Sizes above `--longest` are measured before the first step only: at the
greatest, even that takes one to three minutes.
"""

import argparse
import math
import time
from pathlib import Path

import jax
import numpy as np

from sfv_jax import config as configs
from sfv_jax.data.worlds import World
from sfv_jax.evaluation.report import line_plot
from sfv_jax.methods import sfv
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.files import write_text

SIZES = ((4, 8, 6), (6, 14, 12), (14, 16, 22), (14, 28, 48), (14, 56, 96))  # frames, height, width of latents
CHANNELS, BATCH = 4, 2
FORMS = {
    "printed": dict(recon_reduction="video", recon_weight=0.1, balance=0.0),
    "rms": dict(recon_reduction="rms", recon_weight=1.0, balance=0.0),
    "balanced": dict(recon_reduction="rms", recon_weight=1.0, balance=1.5),
}


def videos(shape: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Returns a batch of conditions and latents `[b, t, h, w, 4]` of unit deviation: shapes that move and bounce."""
    frames, height, width = shape
    world = World(size=max(height, width), num_frames=frames, radii=(height / 6, height / 4), speeds=(height / 16,))
    mix = np.random.default_rng(0).standard_normal((3, CHANNELS)) / np.sqrt(3)
    clips = [world.clip(2 * seed + n, "train")[0][:, :height, :width] for n in range(BATCH)]
    latents = (np.stack(clips).astype(np.float32) / 127.5 - 1) @ mix
    latents = ((latents - latents.mean()) / latents.std()).astype(np.float32)
    means = latents[:, 0].mean(axis=(1, 2))
    ids = np.tile(np.array([6, 127, 0.02], np.float32), (BATCH, 1))
    return {"latents": latents, "cond_latent": latents[:, 0], "image_embed": means, "ids": ids}


def ratios(shape: tuple[int, int, int], steps: int, changes: dict) -> np.ndarray:
    """Returns the ratio of the gradients, adversarial over reconstruction, of each step."""
    config = configs.printed()
    config.update(dict(dtype="float32", accumulation_steps=1))
    config.sfv.update(changes)
    for optimizer, lr in ((config.generator_optimizer, 4e-4), (config.heads_optimizer, 6e-3)):
        optimizer.update(lr=lr, warmup_steps=20, delay_steps=0)
    config.discriminator.update(temporal_kernel=3, projection_dim=16, sinusoid_dim=16)
    unet = UNetConfig(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(16, 32),
        num_attention_heads=(1, 2),
        layers_per_block=1,
        cross_attention_dim=CHANNELS,
        addition_time_embed_dim=8,
        num_frames=shape[0],
        norm_groups=4,
        temporal_conv="matmul",
    )
    networks = sfv.make_networks(unet, config)
    state, frozen = sfv.init_state(networks, config, networks.init_generator(0))
    step = jax.jit(sfv.make_train_step(networks, config), donate_argnums=0)
    found = []
    for n in range(steps):
        state, metrics = step(state, frozen, videos(shape, n))
        found.append(float(metrics["ratio/adv_to_rec_gradient"]))
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sizes", default="", help="numbers of a latent, such as 768,301056; default: all")
    parser.add_argument("--forms", default=",".join(FORMS), help="losses to measure; default: all")
    parser.add_argument("--longest", type=int, default=19_712, help="greatest size of which all steps are made")
    parser.add_argument("--plot", default="", help="SVG of the ratios before the first step over the sizes")
    args = parser.parse_args()
    wanted = {int(size) for size in args.sizes.split(",") if size}
    print("| latents | d | losses | before | last ten | seconds |\n| --- | ---: | --- | ---: | ---: | ---: |")
    forms = {name: FORMS[name] for name in args.forms.split(",")}
    lines: dict[str, list[float]] = {name: [] for name in forms}
    sizes = []
    for shape in SIZES:
        size = int(np.prod(shape)) * CHANNELS
        if wanted and size not in wanted:
            continue
        sizes.append(f"{size:,}")
        for name, changes in forms.items():
            began = time.monotonic()
            found = ratios(shape, args.steps if size <= args.longest else 1, changes)
            seconds = time.monotonic() - began
            lines[name].append(math.log10(found[0]))
            text = "x".join(map(str, (*shape, CHANNELS)))
            last = f"{found[-10:].mean():.3g}" if size <= args.longest else ""
            print(f"| {text} | {size} | {name} | {found[0]:.3g} | {last} | {seconds:.0f} |", flush=True)
    if args.plot:
        title = "Adversarial over reconstruction gradient before the first step"
        write_text(
            Path(args.plot), line_plot(title, lines, f"numbers of a latent: {', '.join(sizes)}", "log10 of ratio")
        )


if __name__ == "__main__":
    main()

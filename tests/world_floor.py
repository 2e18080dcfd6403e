"""How far a model of the procedural world is from the best one possible, by noise level and by frame.

    python -m tests.world_floor --checkpoint runs/world_teacher [--clips 8] [--split train]

All futures of a first frame are known and equally likely, so the best prediction for noised latents z = x + sigma n,
their posterior mean, is computed exactly: sum_i w_i x_i with w_i proportional to exp(-|z - x_i|^2 / (2 sigma^2)) over
the latents x_i of all futures. The table has the mean squared error of the model's prediction and of this one, over
held-out clips, or clips that it was trained on, for latents of unit scale.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sfv_jax.checkpoints.base import training_config, world_rules
from sfv_jax.config_check import checked_world
from sfv_jax.diffusion import edm
from sfv_jax.models.networks import Networks
from sfv_jax.sampling.sampler import Sampler

SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0, 50.0, 700.0)
FRAMES = (0, 1, 3, 6, 9, 13)
PART = 8  # clips that are encoded together


def best(noised: np.ndarray, futures: np.ndarray, sigma: float) -> np.ndarray:
    """Returns the posterior mean of latents `[...]` given `noised [...]` among equally likely `futures [n, ...]`."""
    distances = np.square(noised - futures).reshape(len(futures), -1).sum(1) / (2 * sigma**2)
    weights = np.exp(distances.min() - distances)
    return np.tensordot(weights / weights.sum(), futures, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run in the world, on latents of a VAE")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--split", choices=["heldout", "train"], default="heldout", help="train: seen in training")
    asked = parser.parse_args()
    sampler = Sampler.load(asked.checkpoint)
    world = checked_world(world_rules(training_config(asked.checkpoint)))
    codec, networks = sampler.codec, Networks(sampler.unet)

    def encode(frames: np.ndarray) -> np.ndarray:
        parts = [codec.encode(frames[n : n + PART]) for n in range(0, len(frames), PART)]
        return np.concatenate(parts) * codec.scaling_factor

    predict = jax.jit(lambda p, z, sigma, condition: edm.denoise(networks.generator(p), z, sigma, condition))
    truth, labels = world.batch(range(asked.clips), asked.split)
    latents = encode(truth)
    futures = [encode(world.render_futures(label)) for label in labels]
    condition = {
        "cond_latent": jnp.asarray(latents[:, 0] / codec.scaling_factor),
        "image_embed": codec.embed(truth[:, 0]),
        "ids": jnp.tile(jnp.float32([6, 127, 0]), (asked.clips, 1)),
    }
    rng = np.random.default_rng(0)
    print(f"step {sampler.step}, {asked.clips} clips ({asked.split}), {len(futures[0])} futures of each")
    print("| sigma | model | best | " + " | ".join(f"frame {n}: model, best" for n in FRAMES) + " |")
    print("| ---: |" + " ---: |" * (2 + len(FRAMES)))
    for sigma in SIGMAS:
        noised = latents + np.float32(sigma) * rng.standard_normal(latents.shape).astype(np.float32)
        model = predict(sampler.params, noised, jnp.full(asked.clips, sigma, jnp.float32), condition)
        exact = np.stack([best(z, x, sigma) for z, x in zip(noised, futures, strict=True)])
        errors = [np.square(np.asarray(x) - latents).mean((0, 2, 3, 4)) for x in (model, exact)]
        cells = [f"{errors[0].mean():.4f}", f"{errors[1].mean():.4f}"]
        cells += [f"{errors[0][n]:.3f}, {errors[1][n]:.3f}" for n in FRAMES]
        print(f"| {sigma:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

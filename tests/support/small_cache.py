"""A small latent cache of moving shapes, encoded by block means in place of networks."""

import jax
import numpy as np

from sfv_jax.data.preparation import Settings
from sfv_jax.data.worlds import World
from sfv_jax.models import clip, tree, vae
from sfv_jax.weights.diffusers import save_component

SETTINGS = Settings(height=32, width=48, num_frames=4, shard_size=3)
WORLD = World(size=48, num_frames=4)


def encode(frames: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Stands in for the networks: block means as latents, noise on the first frame from the clip's own seed."""
    b, t, h, w, _ = frames.shape
    mean = frames.reshape(b, t, h // 8, 8, w // 8, 8, 3).mean((3, 5), dtype=np.float32) / 255
    values = np.concatenate([mean, mean.mean(-1, keepdims=True)], -1)
    noise = np.stack([np.random.default_rng(seed).normal(size=values.shape[2:]) for seed in seeds])
    return {"latents": values, "cond_latent": values[:, 0] + noise, "image_embed": values[:, 0].mean(1).reshape(b, -1)}


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_encoders(folder):
    """Writes the two encoders of a tiny SVD folder with random weights; returns the folder."""
    rng = np.random.default_rng(0)
    for name, module, config in (
        ("vae", vae.TemporalVAE, vae.VAEConfig.tiny()),
        ("image_encoder", clip.CLIPVision, clip.CLIPConfig.tiny()),
    ):
        _, shapes = tree.abstract(module, config)
        params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
        save_component(folder / name, name, params, config)
    return folder

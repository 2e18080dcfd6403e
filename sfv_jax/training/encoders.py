"""Model folder with the VAE of a training run and a CLIP tower: what a UNet needs to be trained on its latents."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import load_vae
from sfv_jax.checkpoints.model_folder import load_model, read_model, save_model
from sfv_jax.checkpoints.run import read_config
from sfv_jax.config import world_of
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.models.codec import SVDCodec
from sfv_jax.weights.folders import refuse_existing

CLIPS = 256  # whose latents determine the scaling factor
SAME_SCALE = 0.01  # relative; a tuned decoder must not change the latents of UNets that were trained before
TOWER = CLIPConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=28,
    projection_dim=64,
)


def export_encoders(
    run: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    raw: bool = False,
    fp16: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a model folder without a UNet, for `config.encoders`.

    The scaling factor is the inverse of the root mean square of the latents of `CLIPS` training clips. One that the VAE
    brings along stays if it is within `SAME_SCALE` of that. Without `base`, the tower has random weights: the UNet has
    the whole first frame as its condition latent, and needs from the embedding only that it is a fixed function of the
    image.

    Args:
      run: workdir of a run that trained a VAE on a world.
      dst: the folder to write.
      base: model folder with the CLIP tower to copy.
      raw: take the trained weights instead of their moving average.
      fp16: write a packed folder in half precision (`checkpoints.model_folder`).
      overwrite: replace an existing `dst`.

    Raises:
      WeightsError: if `run` does not train a VAE, or `dst` exists.
      WorkdirError: if the run has no checkpoint yet.
    """
    refuse_existing(Path(dst), overwrite)
    config, vae = load_vae(run, raw=raw)
    if base is None:
        tower_config, tower = TOWER, tree.init(CLIPVision, TOWER, 0)
    else:
        tower_config = read_model(base).configs["image_encoder"]
        tower = load_model(base, ("image_encoder",))[0]["image_encoder"]
    recorded = read_config(Path(run))
    world = world_of(ConfigDict(recorded))
    codec = SVDCodec(config, tower_config, {"vae": vae, "image_encoder": tower})
    square = np.mean([np.mean(np.square(codec.encode(world.clip(n)[0][None]))) for n in range(CLIPS)])
    factor = float(1 / np.sqrt(square))
    if abs(factor / config.scaling_factor - 1) > SAME_SCALE:
        config = dataclasses.replace(config, scaling_factor=round(factor, 5))
    components: dict[str, tree.Params | Path] = {"vae": vae, "image_encoder": tower}
    sums = {"vae/parameters": digest(vae), "image_encoder/parameters": digest(tower)}
    origin = {"folder": Path(run).name, "sha256": sums, "world": dataclasses.asdict(world)}
    configs = {"vae": config, "image_encoder": tower_config}
    packed = "float16" if fp16 else None
    save_model(dst, components, configs, extra={"source": origin}, packed=packed, overwrite=overwrite)


def digest(params: tree.Params) -> str:
    """Returns the SHA-256 of all arrays of a tree and their paths."""
    total = hashlib.sha256()
    for path, x in sorted(tree.flatten(jax.device_get(params)).items()):
        total.update(f"{path} {x.dtype} {x.shape}".encode())
        total.update(np.ascontiguousarray(x).tobytes())
    return total.hexdigest()

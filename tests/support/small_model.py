"""A small model folder with random weights that says it was trained in the procedural world."""

from pathlib import Path

from sfv_jax.checkpoints.model_folder import save_model
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNet, UNetConfig
from tests.support import small_run

WORLD = dict(size=16, num_frames=3, radii=[3.0, 5.0])
CONFIG = {"method": "sfv", "data": {"source": "world", "world": WORLD}}


def save_world_model(folder: Path, seed: int = 0, config: dict | None = CONFIG, size: int = 16) -> Path:
    """Writes a model of 3 frames of size x size pixels with the patch codec, trained with `config`; returns it."""
    unet = UNetConfig(**small_run.UNET | dict(num_frames=3, sample_size=4, temporal_conv="matmul"))
    codec = PatchCodec(patch=4, embed_cell=size // 2)
    run = {} if config is None else {"run": {"step": 3, "raw": False, "config": config}}
    save_model(folder, {"unet": tree.init(UNet, unet, seed)}, {"unet": unet, "codec": codec}, codec="patch", extra=run)
    return folder

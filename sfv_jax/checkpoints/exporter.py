"""What leaves this program: a diffusers pipeline, a UNet folder or a single file, of a model folder or a run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfv_jax.checkpoints.base import is_run, load_generator, read_run
from sfv_jax.checkpoints.card import model_card
from sfv_jax.checkpoints.model_folder import load_model, read_model
from sfv_jax.models import tree
from sfv_jax.weights.components import COMPONENTS, to_json
from sfv_jax.weights.diffusers import save_component
from sfv_jax.weights.folders import WeightsError, new_folder, refuse_existing
from sfv_jax.weights.pipeline import save_pipeline
from sfv_jax.weights.single_file import save_single_file
from sfv_jax.weights.writer import parse_size

WHAT = ("pipeline", "unet", "comfyui")


@dataclass(frozen=True)
class Source:
    """SVD-shaped networks that can be exported.

    Attributes:
      configs: of the three components.
      meta: `model.json` of the model folder they, or the VAE and CLIP tower, come from.
      load: gives the parameters of a component once; what it gave is not kept.
      run: None for a model folder, else `{"step", "raw", "config"}`.
    """

    configs: dict
    meta: dict
    load: Callable[[str], tree.Params]
    run: dict | None


def open_source(path: str | Path, *, raw: bool = False) -> Source:
    """The networks of a model folder or of the newest checkpoint of a training run.

    Raises:
      WeightsError: if they are not SVD's or diffusers cannot express them.
      WorkdirError: if the run has no checkpoint yet.
    """
    path = Path(path)
    unet, _, folder = read_run(path) if is_run(path) else (None, None, path)
    if unet and folder and not folder.is_dir():
        raise WeightsError(f"{path} was trained from {folder}, which is gone: its VAE and CLIP tower are needed")
    model = read_model(folder) if folder else None
    if model is None or model.meta["codec"] != "svd":
        raise WeightsError(f"{path} has a patch codec: diffusers has no pipeline without SVD's VAE and CLIP tower")
    configs = model.configs | ({"unet": unet} if unet else {})
    for name in COMPONENTS:
        to_json(name, configs[name])
    if unet is None:
        return Source(configs, model.meta, lambda name: load_model(model, (name,))[0][name], None)
    base = load_generator(path, raw=raw, codec=False)
    loaded = {"unet": base.params}
    run = {"step": base.step, "raw": raw, "config": json.loads((path / "config.json").read_text())}
    del base

    def load(name: str) -> tree.Params:
        return loaded.pop(name) if name in loaded else load_model(model, (name,))[0][name]

    return Source(configs, model.meta, load, run)


def export_model(
    src: str | Path,
    dst: str | Path,
    *,
    what: str = "pipeline",
    variant: str | None = None,
    raw: bool = False,
    max_shard_size: int | str = "10GB",
    overwrite: bool = False,
) -> None:
    """Writes a model folder or the newest checkpoint of a training run, `src`, for use elsewhere.

    Args:
      dst: a folder, or for "comfyui" a file `NAME.safetensors`, beside which `NAME.md` is written.
      what: "pipeline": a whole diffusers folder; "unet": the UNet's folder alone; "comfyui": one file of all networks.
      variant: "fp16" for half precision, else fp32.
      raw: of a run, the trained weights instead of their moving average.
      max_shard_size: of the weight files of a folder.
    Raises:
      WeightsError: if `src` has no SVD networks that diffusers can express, or `dst` exists.
      WorkdirError: if the run has no checkpoint yet.
    """
    dst = Path(dst)
    for path in (dst, dst.with_suffix(".md")) if what == "comfyui" else (dst,):
        refuse_existing(path, overwrite)
    parse_size(max_shard_size)
    source = open_source(src, raw=raw)
    unet = source.configs["unet"]
    card = model_card(unet, source.meta, what=what, name=dst.name, variant=variant, run=source.run)
    sizes = dict(variant=variant, max_shard_size=max_shard_size)
    if what == "comfyui":
        save_single_file(dst, source.load, source.configs, variant=variant, overwrite=overwrite)
        dst.with_suffix(".md").write_text(card)
    elif what == "unet":
        with new_folder(dst, overwrite=overwrite) as partial:
            save_component(partial, "unet", source.load("unet"), unet, **sizes)
            (partial / "README.md").write_text(card)
    else:
        scheduler = source.meta["scheduler"]
        save_pipeline(dst, source.load, source.configs, scheduler, card=card, overwrite=overwrite, **sizes)

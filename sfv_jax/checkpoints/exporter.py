"""Export of a model folder or a run: as a diffusers pipeline, a UNet folder or a single file."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sfv_jax.checkpoints import box
from sfv_jax.checkpoints.base import is_run, read_run, run_size
from sfv_jax.checkpoints.card import ONE_STEP_METHODS, model_card
from sfv_jax.checkpoints.model_folder import load_model, read_model, save_model
from sfv_jax.checkpoints.run import read_config, restore_ema
from sfv_jax.checkpoints.workflow import Video, workflow
from sfv_jax.models import tree
from sfv_jax.models.unet import UNet
from sfv_jax.runtime.files import write_json
from sfv_jax.weights.components import COMPONENTS, make_config, to_json
from sfv_jax.weights.diffusers import save_component
from sfv_jax.weights.folders import WeightsError, new_folder, read_json, refuse_existing, sums_of, write_sums
from sfv_jax.weights.pipeline import save_pipeline
from sfv_jax.weights.single_file import save_single_file
from sfv_jax.weights.widening import widen, widened
from sfv_jax.weights.writer import parse_size

FOREIGN = ("pipeline", "unet", "comfyui")
WHAT = (*FOREIGN, "model")


@dataclass(frozen=True)
class Source:
    """Networks with SVD's architecture, to be exported.

    Attributes:
      configs: configs of the three components by name.
      meta: `model.json` of the model folder: of all three networks, or of the VAE and CLIP tower of a run.
      load: function from the name of a component to its parameters; call it once per component, as it keeps no copy.
      run: `{"step", "raw", "config"}` of a run; None for a model folder.
      encoders: name of the model in the package that VAE and CLIP tower belong to; None if there is none.
    """

    configs: dict
    meta: dict
    load: Callable[[str], tree.Params]
    run: dict | None
    encoders: str | None = None


def open_source(path: str | Path, *, raw: bool = False, foreign: bool = True) -> Source:
    """Opens the networks of a model folder or of the newest checkpoint of a training run.

    Args:
      path: model folder, or workdir of a run.
      raw: take the trained weights of a run instead of their moving average.
      foreign: whether other programs are to load the networks. A VAE with fewer groups per norm than they have is then
        widened, exactly (`weights.widening`).

    Raises:
      WeightsError: if the networks are not SVD's, or diffusers cannot express them.
      WorkdirError: if the run has no checkpoint yet.
    """
    path = Path(path)
    unet, _, folder = read_run(path) if is_run(path) else (None, None, path)
    if unet and folder and not folder.is_dir():
        raise WeightsError(f"{path} was trained from {folder}, which is gone: its VAE and CLIP tower are needed")
    model = read_model(folder) if folder else None
    if model is None or model.meta["codec"] != "svd":
        raise WeightsError(f"{path} has a patch codec: diffusers has no pipeline without SVD's VAE and CLIP tower")
    configs = {name: unet if unet and name == "unet" else model.config(name) for name in COMPONENTS}
    narrow: Any = configs["vae"]
    if foreign:
        configs = configs | {"vae": widened(narrow)}
        for name in COMPONENTS:
            to_json(name, configs[name])

    def stored(name: str) -> tree.Params:
        params = load_model(model, (name,))[0][name]
        return widen(params, narrow) if name == "vae" and configs["vae"] != narrow else params

    encoders = box.name_of(model.home("vae"))
    if unet is None:
        return Source(configs, model.meta, stored, None, encoders)
    params, step = restore_ema(path, tree.abstract(UNet, unet)[1], name="generator" if raw else "ema")
    loaded = {"unet": params}
    del params
    run = {"step": step, "raw": raw, "config": read_config(path), "size": run_size(path)}

    def load(name: str) -> tree.Params:
        return loaded.pop(name) if name in loaded else stored(name)

    return Source(configs, model.meta, load, run, encoders)


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
    """Writes a model folder or the newest checkpoint of a training run for use in other programs.

    Args:
      src: model folder, or workdir of a run.
      dst: folder to write; for "comfyui" a file `NAME.safetensors`, with a card `NAME.md`, a workflow `NAME.json` and
        a checksum next to it.
      what: "pipeline": a whole diffusers folder; "unet": the UNet's folder alone; "comfyui": one file of all networks;
        "model": a packed model folder, with the UNet alone if VAE and CLIP tower are those of a model in the package.
      variant: "fp16" for half precision, None for fp32.
      raw: export the trained weights of a run instead of their moving average.
      max_shard_size: limit of each weight file of a folder, in bytes or as "10GB".
      overwrite: replace an existing `dst`.

    Raises:
      WeightsError: if `src` has no SVD networks that diffusers can express, or `dst` exists.
      WorkdirError: if the run has no checkpoint yet.
    """
    dst = Path(dst)
    beside = (dst.with_suffix(".md"), dst.with_suffix(".json"), sums_of(dst)) if what == "comfyui" else ()
    for path in (dst, *beside):
        refuse_existing(path, overwrite)
    parse_size(max_shard_size)
    source = open_source(src, raw=raw, foreign=what in FOREIGN)
    unet = source.configs["unet"]
    video = _video(source.run)
    card = model_card(unet, source.meta, what=what, name=dst.name, variant=variant, run=source.run, video=video)
    sizes = dict(variant=variant, max_shard_size=max_shard_size)
    if what == "comfyui":
        sums_of(dst).unlink(missing_ok=True)  # of a file that is replaced
        save_single_file(dst, source.load, source.configs, variant=variant, overwrite=overwrite)
        write_sums(sums_of(dst), [dst])
        write_json(dst.with_suffix(".json"), workflow(dst.name, unet.num_frames, video, one_step=_one_step(source.run)))
        dst.with_suffix(".md").write_text(card)
    elif what == "unet":
        with new_folder(dst, overwrite=overwrite) as partial:
            save_component(partial, "unet", source.load("unet"), unet, **sizes)
            write_sums(sums_of(partial), list(partial.iterdir()))
            (partial / "README.md").write_text(card)
    elif what == "model":
        names = COMPONENTS if source.encoders is None else ("unet",)
        params: dict[str, tree.Params | Path] = {name: source.load(name) for name in names}
        configs = {name: source.configs[name] for name in names}
        extra = {name: source.meta[name] for name in ("scheduler", "source") if name in source.meta}
        extra |= {} if source.encoders is None else {"encoders": source.encoders}
        extra |= {} if source.run is None else {"run": source.run}
        packed = "float16" if variant else "float32"
        save_model(dst, params, configs, extra=extra, packed=packed, overwrite=overwrite)
    else:
        scheduler = source.meta["scheduler"]
        save_pipeline(dst, source.load, source.configs, scheduler, card=card, overwrite=overwrite, **sizes)


def _one_step(run: dict | None) -> bool:
    return run is not None and run["config"].get("method") in ONE_STEP_METHODS


def _video(run: dict | None) -> Video:
    """Returns the settings of the videos of a run, as its latent cache records them; else those of SVD."""
    path = run["config"].get("data", {}).get("path") if run else None
    manifest = Path(path) / "manifest.json" if isinstance(path, str) else None
    if manifest is None or not manifest.is_file():
        size = run["size"] if run else None
        return Video(height=size[0], width=size[1]) if size else Video()
    settings = read_json(manifest, "restore it, or prepare the cache again").get("settings", {})
    return make_config(Video, {f.name: settings[f.name] for f in fields(Video) if f.name in settings}, str(manifest))

"""Import of pipeline folders, lone UNets, Stability's single files and hub repositories as model folders."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp

from sfv_jax.checkpoints.model_folder import read_model, save_model
from sfv_jax.models import tree
from sfv_jax.runtime.files import sha256
from sfv_jax.runtime.progress import ByteReport
from sfv_jax.weights import hub
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import fit, lazy_params, open_component
from sfv_jax.weights.folders import WeightsError, check_sums, printable, read_json, refuse_existing
from sfv_jax.weights.lazy import watched
from sfv_jax.weights.pipeline import NOISE, open_pipeline
from sfv_jax.weights.reader import Tensors, open_weights
from sfv_jax.weights.single_file import components_there, lazy_single_file, open_single_file

DTYPES = ("source", "float32", "float16", "bfloat16")
NAMES = {"unet": "UNet", "vae": "VAE", "image_encoder": "CLIP tower"}
# Fields in which a network must agree with the one that it replaces: the others depend on them.
INTERFACES = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim"),
    "vae": ("in_channels", "out_channels", "latent_channels", "downscale"),
    "image_encoder": ("projection_dim",),
}


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading foreign weights.

    Attributes:
      variant: "fp16" reads the half precision files of a folder; None reads the plain ones.
      dtype: one of `DTYPES`, in which the weights are stored; "source" keeps that of each tensor. Weights from a base
        model remain as they are.
      num_frames: frames per clip of a single file's UNet, see `single_file.open_single_file`.
      allow_pickle: read `.bin` and `.ckpt` files too, only their tensors.
    """

    variant: str | None = None
    dtype: str = "source"
    num_frames: int | None = None
    allow_pickle: bool = False

    @property
    def cast(self) -> jnp.dtype | None:
        """The dtype of the stored weights; None for that of each tensor."""
        return None if self.dtype == "source" else jnp.dtype(self.dtype)


@dataclass(frozen=True)
class _Found:
    """Networks on disk.

    Attributes:
      params: tree of `Lazy` leaves, or folder of a stored component, by name.
      configs: our configs by the same names.
      scheduler: `{"sigma_min", "sigma_max", "rho"}`.
      files: files of the networks by the names under which `model.json` records them.
      codec: "svd" or "patch".
      notes: lines for the user.
      origin: more fields of "source" in `model.json`.
    """

    params: Mapping[str, tree.Params | Path]
    configs: dict
    scheduler: dict
    files: dict[str, Path]
    codec: str = "svd"
    notes: list[str] = field(default_factory=list)
    origin: dict = field(default_factory=dict)


def import_model(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    options: ReadOptions = ReadOptions(),
    overwrite: bool = False,
    verbose: bool = False,
) -> list[str]:
    """Converts `src` to a model folder with some hundred megabytes of weights in memory at a time.

    Args:
      src: a diffusers pipeline folder; the folder or file of one of its networks; a file of one or more networks with
        Stability's names, as ComfyUI writes too; or `hub:ORG/NAME` or `hub:ORG/NAME/FILE`, which is downloaded first.
      dst: the model folder to write.
      base: model folder that provides the networks that `src` lacks, and the fields of configs that no file tells.
      options: how to read `src`.
      overwrite: replace an existing `dst`.
      verbose: show progress.

    Returns:
      Lines for the user on assumptions and on parts that were left out.

    Raises:
      WeightsError: if `src` does not contain exactly such networks, or `dst` exists and `overwrite` is not set.
    """
    refuse_existing(Path(dst), overwrite)
    folder = hub.download(str(src), options.variant) if str(src).startswith(hub.PREFIX) else Path(src)
    for source in filter(None, (folder, base)):
        _refuse_replacing(Path(source), Path(dst))
    found = _find(folder, None if base is None else Path(base), options)
    files = set(found.files.values())
    total = sum(file.stat().st_size for file in files)
    report = ByteReport(2 * total, active=verbose, label="convert")
    try:
        sums = {file: sha256(file, report.advance) for file in sorted(files)}
        check_sums(folder, sums)
        digests = {name: sums[file] for name, file in found.files.items()}
        source = found.origin | {"folder": _name(src), "sha256": found.origin.get("sha256", {}) | digests}
        params = {k: x if isinstance(x, Path) else watched(x, report.advance) for k, x in found.params.items()}
        extra = {"scheduler": found.scheduler, "source": source}
        save_model(dst, params, found.configs, codec=found.codec, extra=extra, overwrite=overwrite)
    finally:
        report.close()
    return found.notes


def _name(src: str | Path) -> str:
    return str(src) if str(src).startswith(hub.PREFIX) else Path(src).resolve().name


def _refuse_replacing(source: Path, dst: Path) -> None:
    try:
        source, dst = source.resolve(), dst.resolve()
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{source} is a link that leads nowhere") from error
    if dst == source or dst in source.parents:
        raise WeightsError(f"{dst} is or contains {source}, which is to be read: choose another --dst")


def _find(src: Path, base: Path | None, options: ReadOptions) -> _Found:
    if not src.is_dir():
        tensors = open_weights(src, options.allow_pickle)
        return _single_file(tensors, base, options) if components_there(tensors) else _lone_file(tensors, base, options)
    if (src / "model.json").is_file():
        raise WeightsError(f"{src} is a model folder already")
    if not (src / "model_index.json").is_file() and (src / "config.json").is_file():
        return _lone_folder(src, base, options)
    if base is not None:
        raise WeightsError(f"{src} holds every network: --base is for a UNet alone and for single files")
    params, configs, scheduler, files = open_pipeline(
        src, variant=options.variant, dtype=options.cast, allow_pickle=options.allow_pickle
    )
    return _Found(params, configs, scheduler, files)


def _single_file(tensors: Tensors, base: Path | None, options: ReadOptions) -> _Found:
    """Returns the networks of a file with Stability's names, and those that it lacks from `base`."""
    configs = read_model(base).configs if base else None
    single = open_single_file(tensors, num_frames=options.num_frames, base=configs)
    params = {name: lazy_single_file(single, name, options.cast) for name in single.configs}
    if single.configs.keys() == COMPONENTS.keys():
        files = {file.name: file for file in tensors.files}
        return _Found(params, single.configs, dict(NOISE), files, notes=single.notes)
    found = _with_base(params, single.configs, tensors.files, base, tensors.where())
    return replace(found, notes=single.notes)


def _lone_file(tensors: Tensors, base: Path | None, options: ReadOptions) -> _Found:
    """Returns one network of a file with diffusers' names, such as AnimateLCM's release, with the rest of `base`."""
    kind = describe(tensors)
    if kind not in LONE:
        raise WeightsError(f"{tensors.where()} holds {kind}, not a network of SVD with diffusers' or Stability's names")
    component = LONE[kind]
    if base is None:
        raise WeightsError(_needs_base(tensors.where(), [component]))
    config = read_model(base).configs.get(component)
    if config is None:
        raise WeightsError(f"{base} has no {NAMES[component]}")
    fitted = fit(tensors, component, config, f"{tensors.where()} does not fit the {NAMES[component]} of {base}")
    params = {component: lazy_params(fitted, component, config, options.cast)}
    return _with_base(params, {component: config}, tensors.files, base, tensors.where())


def _lone_folder(src: Path, base: Path | None, options: ReadOptions) -> _Found:
    """Returns the network of a folder of diffusers or transformers, with the rest of `base`."""
    data = read_json(src / "config.json")
    found = data.get("_class_name") or data.get("architectures") or "no network of diffusers"
    found = found[0] if isinstance(found, list) else found
    component = next((name for name, c in COMPONENTS.items() if c.class_name == found), None)
    if component is None:
        raise WeightsError(f"{src} holds {printable(found)}, not a pipeline or SVD's UNet, VAE or CLIP tower")
    if base is None:
        raise WeightsError(_needs_base(str(src), [component]))
    tensors, config = open_component(src, component, variant=options.variant, allow_pickle=options.allow_pickle)
    params = {component: lazy_params(tensors, component, config, options.cast)}
    return _with_base(params, {component: config}, (*tensors.files, src / "config.json"), base, str(src))


def _needs_base(where: str, found: list[str]) -> str:
    """Returns the message on networks that are missing where no `base` is given."""
    missing = " and ".join(NAMES[name] for name in NAMES if name not in found)
    what = f"is a {NAMES[found[0]]} alone" if len(found) == 1 else f"has no {missing}"
    return f"{where} {what}: pass --base MODEL_FOLDER, a converted model whose {missing} it is to have"


def _with_base(params: dict, configs: dict, files: tuple[Path, ...], base: Path | None, where: str) -> _Found:
    """Returns the networks `params` of `files` with the remaining ones of the model folder `base`."""
    if base is None:
        raise WeightsError(_needs_base(where, list(params)))
    model = read_model(base)
    meta = model.meta
    stranger = [name for name in params if name not in meta["components"]]
    if stranger:
        raise WeightsError(f"{base} has no {NAMES[stranger[0]]}: it cannot be replaced there")
    differ = [
        f"{NAMES[name]}: {field} is {getattr(configs[name], field)}, in {base} {getattr(model.configs[name], field)}"
        for name in params
        for field in INTERFACES[name]
        if getattr(configs[name], field) != getattr(model.configs[name], field)
    ]
    if differ:
        raise WeightsError(f"{where} does not go with the other networks of {base}: {'; '.join(differ)}")
    stored = {name: base.absolute() / name for name in meta["components"] if name not in params}
    digests = meta.get("source", {}).get("sha256", {})
    kept = {file: digest for file, digest in digests.items() if not file.startswith(tuple(f"{n}/" for n in params))}
    origin = {"base": base.resolve().name, "sha256": kept}
    named = {f"{name}/{file.name}": file for name in params for file in files}
    return _Found(params | stored, model.configs | configs, dict(NOISE), named, meta["codec"], origin=origin)


LONE = {"a video UNet": "unet", "a video VAE": "vae", "a CLIP tower with projection": "image_encoder"}  # of `describe`


def describe(tensors: Tensors) -> str:
    """Guesses the kind of network from the names of `tensors`, a key of `LONE` for SVD's, else for error messages."""
    names = tensors.names()

    def some(part: str) -> bool:
        return any(part in name for name in names)

    kinds = {
        "LoRA weights": some(".lora_") or some("lora_A") or some("lora_up"),
        "a motion module of AnimateDiff": some("motion_modules."),
        "a video UNet": "conv_in.weight" in names and some("temporal_transformer_blocks."),
        "a UNet without time layers (Stable Diffusion's)": "conv_in.weight" in names and some("time_embedding."),
        "a video VAE": some("decoder.conv_in.") and some("temporal_res_block."),
        "a VAE": some("decoder.conv_in."),
        "a CLIP tower with projection": some("vision_model.") and "visual_projection.weight" in names,
        "a CLIP tower": some("vision_model."),
        "a tiny decoder (write it to MODEL/tiny_decoder)": "decoder.1.weight" in names,
    }
    return next((kind for kind, found in kinds.items() if found), f"unknown tensors, such as {', '.join(names[:3])}")

"""Import of pipeline folders, lone UNets, Stability's single files and hub repositories as model folders."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp

from sfv_jax.checkpoints.model_folder import read_model, save_model
from sfv_jax.models import tree
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.files import sha256
from sfv_jax.runtime.progress import ByteReport
from sfv_jax.weights import hub, sgm
from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import fit, lazy_params, open_component
from sfv_jax.weights.folders import WeightsError, read_json, refuse_existing
from sfv_jax.weights.lazy import watched
from sfv_jax.weights.pipeline import SIGMAS, open_pipeline
from sfv_jax.weights.reader import Tensors, open_weights
from sfv_jax.weights.single_file import is_single_file, lazy_single_file, open_single_file

DTYPES = ("source", "float32", "float16", "bfloat16")
NEEDS_BASE = (
    "is a UNet alone: pass --base MODEL_FOLDER, a converted model whose VAE, CLIP tower and (for a file) UNet config "
    "it is to have"
)


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
      src: a diffusers pipeline folder; a UNet's folder or file; a single file with Stability's names; or
        `hub:ORG/NAME` or `hub:ORG/NAME/FILE`, which is downloaded first.
      dst: the model folder to write.
      base: model folder that provides the other networks, if `src` is a UNet alone.
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
    total = sum(file.stat().st_size for file in found.files.values())
    report = ByteReport(2 * total, active=verbose, label="convert")
    try:
        digests = {name: sha256(file, report.advance) for name, file in found.files.items()}
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
        raise WeightsError(f"{dst} is or holds what is to be read: choose another destination")


def _find(src: Path, base: Path | None, options: ReadOptions) -> _Found:
    if not src.is_dir():
        tensors = open_weights(src, options.allow_pickle)
        if is_single_file(tensors):
            _refuse_base(src, base)
            return _single_file(tensors, options)
        return _unet_file(tensors, base, options)
    if (src / "model.json").is_file():
        raise WeightsError(f"{src} is a model folder already")
    if not (src / "model_index.json").is_file() and (src / "config.json").is_file():
        return _unet_folder(src, base, options)
    _refuse_base(src, base)
    params, configs, scheduler, files = open_pipeline(
        src, variant=options.variant, dtype=options.cast, allow_pickle=options.allow_pickle
    )
    return _Found(params, configs, scheduler, files)


def _refuse_base(src: Path, base: Path | None) -> None:
    if base is not None:
        raise WeightsError(f"{src} holds every network: --base is for a UNet alone")


def _single_file(tensors: Tensors, options: ReadOptions) -> _Found:
    single = open_single_file(tensors, num_frames=options.num_frames)
    params = {name: lazy_single_file(single, name, options.cast) for name in single.configs}
    files = {file.name: file for file in tensors.files}
    return _Found(params, single.configs, SIGMAS | {"rho": 7.0}, files, notes=single.notes)


def _unet_file(tensors: Tensors, base: Path | None, options: ReadOptions) -> _Found:
    """Returns the UNet of a file with diffusers' names, such as AnimateLCM's release, with the rest of `base`."""
    kind = describe(tensors)
    if kind != "a video UNet":
        raise WeightsError(f"{tensors.where()} holds {kind}, not SVD's UNet with diffusers' or Stability's names")
    if base is None:
        raise WeightsError(f"{tensors.where()} {NEEDS_BASE}")
    config = _config_of_base(base)
    fitted = fit(tensors, "unet", config, f"{tensors.where()} does not fit the UNet of {base}")
    return _with_base(lazy_params(fitted, "unet", config, options.cast), config, tensors.files, base)


def _unet_folder(src: Path, base: Path | None, options: ReadOptions) -> _Found:
    """Returns the UNet of a diffusers folder, with the rest of `base`."""
    found = read_json(src / "config.json").get("_class_name")
    if found != COMPONENTS["unet"].class_name:
        raise WeightsError(f"{src} holds {found or 'no network of diffusers'}, not a pipeline or SVD's UNet")
    if base is None:
        raise WeightsError(f"{src} {NEEDS_BASE}")
    tensors, config = open_component(src, "unet", variant=options.variant, allow_pickle=options.allow_pickle)
    assert isinstance(config, UNetConfig)
    other = _config_of_base(base)
    differ = [
        f"{name} is {getattr(config, name)}, in {base} {getattr(other, name)}"
        for name in ("in_channels", "out_channels", "cross_attention_dim")
        if getattr(config, name) != getattr(other, name)
    ]
    if differ:
        raise WeightsError(f"{src} does not go with the VAE and CLIP tower: {'; '.join(differ)}")
    params = lazy_params(tensors, "unet", config, options.cast)
    return _with_base(params, config, (*tensors.files, src / "config.json"), base)


def _config_of_base(base: Path) -> UNetConfig:
    configs = read_model(base).configs
    if "unet" not in configs:
        raise WeightsError(f"{base} has no UNet")
    return configs["unet"]


def _with_base(params: tree.Params, config: UNetConfig, files: tuple[Path, ...], base: Path) -> _Found:
    model = read_model(base)
    configs, meta = model.configs, model.meta
    stored = {name: base.absolute() / name for name in meta["components"] if name != "unet"}
    digests = meta.get("source", {}).get("sha256", {})
    kept = {file: digest for file, digest in digests.items() if not file.startswith("unet/")}
    origin = {"base": base.resolve().name, "sha256": kept}
    return _Found(
        {"unet": params} | stored,
        configs | {"unet": config},
        meta["scheduler"],
        {f"unet/{file.name}": file for file in files},
        meta["codec"],
        origin=origin,
    )


def describe(tensors: Tensors) -> str:
    """Guesses the kind of network from the names of `tensors`, for error messages; "a video UNet" for SVD's."""
    names = tensors.names()

    def some(part: str) -> bool:
        return any(part in name for name in names)

    kinds = {
        "LoRA weights": some(".lora_") or some("lora_A") or some("lora_up"),
        "a motion module of AnimateDiff": some("motion_modules."),
        "a single file with the names of the original": some(sgm.UNET),
        "a video UNet": "conv_in.weight" in names and some("temporal_transformer_blocks."),
        "a UNet without time layers (Stable Diffusion's)": "conv_in.weight" in names and some("time_embedding."),
        "a VAE": some("decoder.conv_in."),
        "a CLIP tower": some("vision_model."),
    }
    return next((kind for kind, found in kinds.items() if found), f"unknown tensors, such as {', '.join(names[:3])}")

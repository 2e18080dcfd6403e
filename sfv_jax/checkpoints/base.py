"""What there is to start from: a model folder, or the workdir of a training run.

A workdir holds `network.json` beside its checkpoints: the UNet's config and where its codec comes from. So a run can be
sampled, exported or fine-tuned further by naming its workdir.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from sfv_jax.checkpoints.model_folder import ModelFolder, encoders_identity, load_codec, load_model, read_model
from sfv_jax.checkpoints.run import restore_ema
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.runtime.files import sha256, write_json
from sfv_jax.weights.diffusers import load_component
from sfv_jax.weights.folders import WeightsError


@dataclass(frozen=True)
class Base:
    """A generator and the codec it was trained with.

    Attributes:
      params: UNet parameters, nested dict of arrays.
      codec: None where the caller asked not to load it.
      model: the model folder that has the VAE and CLIP tower; None for the patch codec.
      step: training steps, None for a model folder.
    """

    unet: UNetConfig
    params: tree.Params
    codec: SVDCodec | PatchCodec | None
    model: ModelFolder | None
    step: int | None


def describe_run(workdir: Path, unet: UNetConfig, codec: PatchCodec | None, model: Path | None) -> None:
    """Writes `workdir/network.json`: the UNet's config, and the patch codec or the model folder of SVD's codec."""
    content = {
        "unet": dataclasses.asdict(unet),
        "patch_codec": dataclasses.asdict(codec) if codec else None,
        "model": str(model.resolve()) if model else None,
    }
    write_json(workdir / "network.json", content)


def read_run(workdir: Path) -> tuple[UNetConfig, PatchCodec | None, Path | None]:
    """What `describe_run` wrote."""
    content = json.loads((workdir / "network.json").read_text())
    unet = UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in content["unet"].items()})
    codec = PatchCodec(**content["patch_codec"]) if content["patch_codec"] else None
    return unet, codec, Path(content["model"]) if content["model"] else None


def is_run(path: str | Path) -> bool:
    """Whether `path` is the workdir of a training run."""
    return (Path(path) / "network.json").is_file()


def load_generator(
    path: str | Path,
    *,
    raw: bool = False,
    codec: bool = True,
    place: Callable | None = None,
    dtype=jax.numpy.float32,
) -> Base:
    """The generator of a model folder, or the newest moving average (`raw`: the trained weights) of a run.

    Args:
      place: `abstract parameters -> shardings`, where to read them to; default: whole on the first local device.
      dtype: of the parameters; those of a model folder are read in it, those of a run, fp32 on disk, cast afterwards.
    Raises:
      WeightsError: if `path` is neither, or if the model folder a run's codec came from is gone.
      WorkdirError: if the run has no checkpoint yet.
    """
    path = Path(path)
    if not is_run(path):
        model = read_model(path)
        config = model.configs["unet"]
        shardings = place and {"unet": place(tree.abstract(UNet, config)[1])}
        params = load_model(model, ("unet",), dtype=dtype, shardings=shardings)[0]["unet"]
        encoders = None if model.meta["codec"] == "patch" else model
        return Base(config, params, load_codec(model) if codec else None, encoders, None)
    unet, patch_codec, folder = read_run(path)
    _, abstract = tree.abstract(UNet, unet)
    name, shardings = "generator" if raw else "ema", place and place(abstract)
    params, step = restore_ema(path, abstract, name=name, shardings=shardings)
    if folder and not folder.is_dir():
        raise WeightsError(f"{path} was trained from {folder}, which is gone: its VAE and CLIP tower are needed")
    model = read_model(folder) if folder else None
    loaded = patch_codec or (load_codec(model) if model and codec else None)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return Base(unet, params, loaded, model, step)


def load_encoders(svd: str | os.PathLike) -> tuple[SVDCodec, str]:
    """Returns SVD's VAE and CLIP tower as a codec, and a string that identifies their weights.

    Args:
      svd: a model folder, identified by the SHA-256 digests recorded when it was converted, or a diffusers folder.
    Raises:
      WeightsError: if `svd` is neither, or has the patch codec.
    """
    names = ("vae", "image_encoder")
    if (Path(svd) / "model.json").is_file():
        model = read_model(svd)
        if model.meta["codec"] != "svd":
            raise WeightsError(f"{svd} has codec {model.meta['codec']!r}: videos need SVD's VAE and CLIP tower")
        return load_codec(model), encoders_identity(model.meta)
    params, configs, files = zip(*(load_component(Path(svd) / name, name) for name in names), strict=True)
    codec = SVDCodec(*configs, jax.device_put(dict(zip(names, params, strict=True))))
    return codec, "+".join(sorted(sha256(file) for group in files for file in group))

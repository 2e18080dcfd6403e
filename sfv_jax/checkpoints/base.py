"""Generators to start from: those of model folders and of training runs.

The workdir of a run contains `network.json` with the UNet's config and the origin of the codec. So a workdir, like a
model folder, is enough to sample, export or fine-tune a generator.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sfv_jax.checkpoints import box
from sfv_jax.checkpoints.model_folder import ModelFolder, encoders_identity, load_codec, load_model, read_model
from sfv_jax.checkpoints.run import read_config, restore_ema
from sfv_jax.choices import MOST_PIXELS
from sfv_jax.data.worlds import World
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.runtime.files import FileError, read_json, sha256, write_json
from sfv_jax.weights.components import from_json, make_config
from sfv_jax.weights.diffusers import load_component
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.folders import read_json as weights_json


@dataclass(frozen=True)
class Base:
    """A generator and the codec of its training.

    Attributes:
      unet: config of the UNet.
      params: UNet parameters, nested dict of arrays.
      codec: converts images to conditions, and frames to latents and back.
      model: the model folder that contains the VAE and CLIP tower; None with the patch codec.
      step: number of training steps; None for a model folder.
      size: (height, width) in pixels of the videos it was trained on; None if they are not recorded.
      world: whether they are videos of the procedural world.
    """

    unet: UNetConfig
    params: tree.Params
    codec: SVDCodec | PatchCodec
    model: ModelFolder | None
    step: int | None
    size: tuple[int, int] | None = None
    world: bool = False


def describe_run(
    workdir: Path,
    unet: UNetConfig,
    codec: PatchCodec | None,
    model: Path | None,
    size: tuple[int, int] | None = None,
) -> None:
    """Writes `workdir/network.json`.

    It has the UNet's config, the patch codec or the model folder of SVD's codec, and the `(height, width)` in pixels of
    the videos of the training.
    """
    content = {
        "unet": dataclasses.asdict(unet),
        "patch_codec": dataclasses.asdict(codec) if codec else None,
        "model": (box.name_of(model) or str(model.resolve())) if model else None,
        "size": size,
    }
    write_json(workdir / "network.json", content)


def describe_vae(workdir: Path, vae: VAEConfig) -> None:
    """Writes `workdir/network.json` of a run that trains a VAE: its config."""
    write_json(workdir / "network.json", {"vae": dataclasses.asdict(vae)})


REMEDY = "restore it from a copy, or repeat the run's training command, which writes it anew"


def load_vae(path: str | Path, *, raw: bool = False) -> tuple[VAEConfig, tree.Params]:
    """Loads the VAE of a model folder, or of the newest checkpoint of a run that trains one.

    Args:
      path: model folder, or workdir of the run.
      raw: load the trained weights of a run instead of their moving average.

    Returns:
      The config, and the parameters, fp32.

    Raises:
      WeightsError: if `path` is neither, or the run trains something else.
      WorkdirError: if the run has no checkpoint yet.
    """
    if not is_run(path):
        params, configs, _ = load_model(path, ("vae",), dtype=jax.numpy.float32)
        return configs["vae"], params["vae"]
    file = Path(path) / "network.json"
    content = read_json(file, REMEDY)
    if "vae" not in content:
        raise WeightsError(f"{path} is the run of a generator, not of a VAE")
    try:
        config = make_config(VAEConfig, content["vae"], str(file))
    except WeightsError as error:
        raise FileError(f"{error}; {REMEDY}") from error
    _, abstract = tree.abstract(TemporalVAE, config)
    return config, restore_ema(Path(path), abstract, name="generator" if raw else "ema")[0]


def read_run(workdir: Path) -> tuple[UNetConfig, PatchCodec | None, Path | None]:
    """Returns the UNet's config, the patch codec and the model folder that `describe_run` wrote.

    Raises:
      FileError: if `network.json` is damaged.
      WeightsError: if the run trains a VAE.
    """
    path = workdir / "network.json"
    content = read_json(path, REMEDY)
    if set(content) == {"vae"}:
        raise WeightsError(
            f"{workdir} is the run of a VAE: `python -m sfv_jax.convert --export --what encoders` makes a model folder"
        )
    content = read_json(path, REMEDY, ("unet", "patch_codec", "model"))
    unet, codec, model = (content[name] for name in ("unet", "patch_codec", "model"))
    if model is not None and not isinstance(model, str):
        raise FileError(f"{path}: field model is not a path; {REMEDY}")
    try:
        made = make_config(UNetConfig, unet, str(path)), codec and make_config(PatchCodec, codec, str(path))
    except WeightsError as error:
        raise FileError(f"{error}; {REMEDY}") from error
    return *made, box.located(model) if model else None


def is_run(path: str | Path) -> bool:
    """Returns whether `path` is the workdir of a training run."""
    return (Path(path) / "network.json").is_file()


def read_unet(path: str | Path) -> UNetConfig:
    """Returns the config of the UNet of a model folder or run; raises as `load_generator` does."""
    return read_run(Path(path))[0] if is_run(path) else read_model(Path(path)).config("unet")


def load_generator(
    path: str | Path,
    *,
    raw: bool = False,
    place: Callable | None = None,
    dtype=jax.numpy.float32,
) -> Base:
    """Loads the generator of a model folder, or of the newest checkpoint of a run.

    Args:
      path: model folder, or workdir of a run.
      raw: load the trained weights of a run instead of their moving average.
      place: `abstract parameters -> shardings` of the parameters; default: whole on the first local device.
      dtype: dtype of the parameters. Those of a model folder are read in it; those of a run, fp32 on disk, are cast
        after reading.

    Raises:
      WeightsError: if `path` is neither, or if the model folder of a run's codec does not exist anymore.
      WorkdirError: if the run has no checkpoint yet.
    """
    path = Path(path)
    if not is_run(path):
        model = read_model(path)
        config = model.config("unet")
        shardings = place and {"unet": place(tree.abstract(UNet, config)[1])}
        params = load_model(model, ("unet",), dtype=dtype, shardings=shardings)[0]["unet"]
        encoders = None if model.meta["codec"] == "patch" else model
        recorded = exported_config(model.meta)
        size = _size_of(model.meta.get("run")) or world_size(recorded)
        return Base(config, params, load_codec(model), encoders, None, size, world_rules(recorded) is not None)
    unet, patch_codec, folder = read_run(path)
    _, abstract = tree.abstract(UNet, unet)
    name, shardings = "generator" if raw else "ema", place and place(abstract)
    params, step = restore_ema(path, abstract, name=name, shardings=shardings)
    if folder and not folder.is_dir():
        raise WeightsError(f"{path} was trained from {folder}, which is gone: its VAE and CLIP tower are needed")
    model = read_model(folder) if folder else None
    codec = patch_codec or (load_codec(model) if model else None)
    if codec is None:
        raise WeightsError(f"{path}/network.json names neither a patch codec nor a model folder")
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    recorded = read_config(path) if (path / "config.json").is_file() else {}
    size = run_size(path) or world_size(recorded)
    return Base(unet, params, codec, model, step, size, world_rules(recorded) is not None)


def run_size(workdir: Path) -> tuple[int, int] | None:
    """Returns `(height, width)` in pixels of the videos of a run's training; None if `network.json` has none."""
    return _size_of(read_json(workdir / "network.json", REMEDY))


def _size_of(content: Any) -> tuple[int, int] | None:
    size = content.get("size") if isinstance(content, dict) else None
    sound = isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= MOST_PIXELS for n in size)
    return (size[0], size[1]) if sound else None


def training_config(path: str | Path) -> dict[str, Any]:
    """Returns the config of the training of a run, or of the one that a model folder records, as JSON; {} if none."""
    path = box.located(path)
    return read_config(path) if is_run(path) else exported_config(read_model(path).meta)


def exported_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns what a `model.json` tells of the training's config: that of the run, or the rules of the world."""
    run, source = meta.get("run"), meta.get("source")
    config = run.get("config") if isinstance(run, dict) else None
    config = config if isinstance(config, dict) else {}
    rules = source.get("world") if isinstance(source, dict) else None
    return {"data": {"source": "world", "world": rules}} | config if isinstance(rules, dict) else config


def world_rules(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the rules of the procedural world of a recorded config; None if it had another source, or for damage."""
    data = config.get("data")
    rules = data.get("world") if isinstance(data, dict) and data.get("source", "world") == "world" else None
    return rules if isinstance(rules, dict) else None


def world_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Returns (height, width) of the videos of the world of a recorded config, in pixels; None if it had none."""
    size = (world_rules(config) or {"size": None}).get("size", World.size)
    return (size, size) if isinstance(size, int) else None


def downscale_of(path: str | Path) -> int:
    """Returns the pixels per latent cell of a model folder or run; 1 for a run without its model folder."""
    _, patch, folder = read_run(Path(path)) if is_run(path) else (None, None, Path(path))
    if patch or folder is None or is_run(path) and not folder.is_dir():
        return patch.downscale if patch else 1
    found = read_model(folder).configs
    return found["codec"].downscale if "codec" in found else found["vae"].downscale


def clip_length(svd: str | os.PathLike) -> int | None:
    """Returns the frames of a clip of a model folder's or diffusers folder's UNet; None if there is no UNet."""
    folder = box.located(os.fspath(svd))
    if (folder / "model.json").is_file():
        unet = read_model(folder).configs.get("unet")
        return unet.num_frames if unet else None
    path = folder / "unet" / "config.json"
    return from_json("unet", weights_json(path), str(path)).num_frames if path.is_file() else None


def load_encoders(svd: str | os.PathLike) -> tuple[SVDCodec, str]:
    """Loads SVD's VAE and CLIP tower.

    Args:
      svd: model folder, name of one in the package, or diffusers folder.

    Returns:
      codec: the codec with both networks.
      identity: SHA-256 digests of their weight files; for a model folder those recorded at its conversion.

    Raises:
      WeightsError: if `svd` is neither, or a model folder with the patch codec.
    """
    folder = box.located(os.fspath(svd))
    if (folder / "model.json").is_file():
        model = read_model(folder)
        codec = load_codec(model)
        if not isinstance(codec, SVDCodec):
            raise WeightsError(f"{svd} has codec {model.meta['codec']!r}: videos need SVD's VAE and CLIP tower")
        return codec, encoders_identity(model.meta)
    vae, vae_config, vae_files = load_component(folder / "vae", "vae")
    tower, tower_config, tower_files = load_component(folder / "image_encoder", "image_encoder")
    assert isinstance(vae_config, VAEConfig) and isinstance(tower_config, CLIPConfig)
    codec = SVDCodec(vae_config, tower_config, jax.device_put({"vae": vae, "image_encoder": tower}))
    return codec, "+".join(sorted(sha256(file) for file in (*vae_files, *tower_files)))

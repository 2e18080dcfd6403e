"""Our model folder, from which sampling and training start: `model.json` and one orbax tree per network.

    DIR/model.json      description: codec, configs, noise range, origin; written last
    DIR/unet/           orbax tree of the UNet's parameters
    DIR/vae/  DIR/image_encoder/      only with codec "svd"
    DIR/fingerprints.json   checksums of all parameters, which loading verifies

Small networks can instead be packed as one safetensors file each, `DIR/unet.safetensors` and so on, with the paths of
the parameters as names. The package contains such folders (checkpoints/box.py), which have names instead of paths. A
UNet, or a tiny decoder, that was trained on the encoders of one of them does not repeat them: `encoders` in its
`model.json` names it.

The state of a training run has another format (sfv_jax/checkpoints/run.py).
"""

import dataclasses
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sfv_jax.checkpoints import box, fingerprints
from sfv_jax.choices import TINY_DECODER
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.runtime.files import write_json
from sfv_jax.weights.components import COMPONENTS, make_config
from sfv_jax.weights.folders import WeightsError, new_folder, printable, read_json, shape_problems
from sfv_jax.weights.lazy import save_tree
from sfv_jax.weights.pipeline import NOISE, check_noise
from sfv_jax.weights.reader import open_weights
from sfv_jax.weights.writer import write_safetensors

FORMAT, VERSION = "sfv_jax", 1
CODECS = ("svd", "patch")
MODULES = {name: component.module for name, component in COMPONENTS.items()} | {TINY_DECODER: TinyTemporalDecoder}
CONFIGS = {name: component.config for name, component in COMPONENTS.items()}
CONFIGS |= {"codec": PatchCodec, TINY_DECODER: TinyDecoderConfig}


@dataclass(frozen=True)
class ModelFolder:
    """Content of the `model.json` of a model folder, read once.

    Attributes:
      path: the folder.
      configs: our config of each component by name, and "codec" for the patch codec.
      meta: the whole content; `meta["scheduler"]` has sigma_min, sigma_max and rho.
      encoders: the model in the package whose VAE and CLIP tower this one uses; None if the folder has its own.
        `configs` and `meta["components"]` include them.
    """

    path: Path
    configs: dict[str, Any]
    meta: dict[str, Any]
    encoders: "ModelFolder | None" = None

    def home(self, name: str) -> Path:
        """Returns the folder that stores a component: this one, or that of the shared encoders."""
        if self.encoders is not None and name in self.encoders.configs:
            return self.encoders.path
        return self.path

    def config(self, name: str) -> Any:
        """Returns the config of a component.

        Raises:
          WeightsError: if the folder does not have it.
        """
        if name not in self.configs:
            raise WeightsError(f"{self.path} has no {name}, only {', '.join(self.meta['components'])}")
        return self.configs[name]


def resolve_model(path: str | Path) -> Path:
    """Returns `path` if it is a model folder, or the folder of a model in the package by its name.

    Raises:
      WeightsError: if it is neither; the message names what was found instead.
    """
    path = box.located(path)
    if (path / "model.json").is_file():
        return path
    if not path.exists():
        raise WeightsError(f"{path} does not exist; the models in the package are {', '.join(box.NAMES)}")
    if (path / "model_index.json").is_file():
        raise WeightsError(
            f"{path} is a diffusers folder. Convert it first: python -m sfv_jax.convert --src {path} --dst NEW_FOLDER"
        )
    if (path / "decoder.json").is_file():
        raise WeightsError(f"{path} is a run that trains a tiny decoder: name a model here, and this run as --decoder")
    raise WeightsError(f"{path} is not a model folder: it has no model.json")


def save_model(
    folder: str | Path,
    components: dict[str, tree.Params | Path],
    configs: dict,
    *,
    codec: str = "svd",
    extra: dict | None = None,
    packed: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model folder, completely or not at all; for a single process that can read every array.

    Args:
      folder: the folder to write.
      components: `{"unet": ..., "vae": ..., "image_encoder": ...}` or some of them. A value is a nested dict of arrays
        or of `Lazy` leaves, which are read during writing, or a path `MODEL_FOLDER/NAME` to copy.
      configs: a config for each component; with codec "patch" also `{"codec": PatchCodec(...)}`.
      codec: "svd" (vae and image_encoder) or "patch".
      extra: more fields of `model.json`, such as "scheduler" and "source".
      packed: "float32" or "float16" for networks as safetensors of this dtype; None for orbax trees as they are.
      overwrite: replace an existing folder.

    Raises:
      WeightsError: if the folder exists and `overwrite` is not set, or if parameters and configs do not fit.
    """
    if codec not in CODECS:
        raise WeightsError(f"codec {codec!r}: choose one of {', '.join(CODECS)}")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "codec": codec,
        "components": {name: _describe(name, params, configs) for name, params in components.items()},
        "configs": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "scheduler": dict(NOISE),
    }
    prints: dict[str, fingerprints.Prints] = {}
    with new_folder(folder, overwrite=overwrite) as partial:
        for name, params in components.items():
            if isinstance(params, Path) and packed is None and params.is_dir():
                shutil.copytree(params, partial / name)
                prints |= {k: v for k, v in fingerprints.recorded(params.parent).items() if k == params.name}
                continue
            if isinstance(params, Path):
                params = load_model(params.parent, (params.name,))[0][params.name]
            if packed:
                dtype = np.dtype(packed)
                meta["components"][name]["dtype"] = packed
                params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)  # noqa: B023
                flat: dict[str, Any] = tree.flatten(fingerprints.recording(params, prints.setdefault(name, {})))
                shapes = {path: tuple(value.shape) for path, value in flat.items()}
                arrays = ((path, value.read()) for path, value in flat.items())
                write_safetensors(partial / f"{name}.safetensors", shapes, arrays, dtype)
            else:
                save_tree(partial / name, fingerprints.recording(params, prints.setdefault(name, {})))
        write_json(partial / fingerprints.FILE, prints)
        write_json(partial / "model.json", meta | (extra or {}))


def _describe(name: str, params: tree.Params | Path, configs: dict) -> dict:
    if name not in configs:
        raise WeightsError(f"no config for {name}")
    if isinstance(params, Path):
        return read_model(params.parent).meta["components"][params.name]
    _check(name, {k: tuple(v.shape) for k, v in tree.flatten(params).items()}, configs[name], "the parameters given")
    dtypes = sorted({str(np.dtype(x.dtype)) for x in jax.tree.leaves(params)})
    return {"parameters": tree.count(params), "dtype": ", ".join(dtypes)}


def _check(name: str, found: dict[str, tuple], config, where: str) -> tree.Params:
    """Returns the parameter shapes of `config`; raises WeightsError if `found` differs, and lists all differences."""
    _, shapes = tree.abstract(MODULES[name], config)
    problems = shape_problems(found, {k: v.shape for k, v in tree.flatten(shapes).items()})
    if problems:
        raise WeightsError(f"{name}: {where} do not fit the config:\n  " + "\n  ".join(problems))
    return shapes


def read_model(folder: str | Path | ModelFolder) -> ModelFolder:
    """Reads `model.json` without the weights; returns a `ModelFolder` unchanged.

    Raises:
      WeightsError: if `folder` is not a model folder or was written by a newer version of this program.
    """
    if isinstance(folder, ModelFolder):
        return folder
    folder = resolve_model(folder)
    meta = read_json(folder / "model.json", "restore the folder from a copy, or convert the model again")
    if meta.get("format") != FORMAT:
        raise WeightsError(f"{folder}/model.json is not of format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise WeightsError(f"{folder} has version {meta.get('version')!r}, this program reads version {VERSION}")
    configs = _configs(meta, f"{folder}/model.json")
    if "encoders" not in meta:
        return ModelFolder(folder, configs, meta)
    encoders = _shared_encoders(meta, folder)
    components = encoders.meta["components"] | meta["components"]
    return ModelFolder(folder, encoders.configs | configs, meta | {"components": components}, encoders)


def _shared_encoders(meta: dict, folder: Path) -> ModelFolder:
    """Returns the model in the package that a `model.json` names as its encoders, after comparing their digests."""
    name = meta["encoders"]
    if name not in box.NAMES:
        raise WeightsError(
            f"{folder} uses the encoders {printable(name)} of another version of this package; it has "
            f"{', '.join(box.NAMES)}"
        )
    encoders = read_model(name)
    if encoders_identity(encoders.meta) != encoders_identity(meta):
        raise WeightsError(f"{folder} was trained on another version of {name} than the one in this package")
    return encoders


def _configs(meta: dict, where: str) -> dict[str, Any]:
    """Returns the configs that `meta` contains; raises WeightsError if it is not what `save_model` writes."""

    def objects(value, names: Collection[str]) -> bool:
        known = isinstance(value, dict) and value.keys() <= set(names)
        return known and all(isinstance(x, dict) for x in value.values())

    components, configs, source = (meta.get(name, {}) for name in ("components", "configs", "source"))
    digests = source.get("sha256", {}) if isinstance(source, dict) else None
    if not objects(components, MODULES):
        raise WeightsError(f"{where} is damaged: components is {printable(components)}")
    sound = {
        "codec": meta.get("codec") in CODECS,
        "configs": objects(configs, CONFIGS) and all(name in configs for name in components),
        "scheduler": isinstance(meta.get("scheduler"), dict),
        "source": isinstance(digests, dict) and all(isinstance(digest, str) for digest in digests.values()),
    }
    wrong = [name for name, right in sound.items() if not right]
    if wrong:
        raise WeightsError(f"{where} is damaged: {wrong[0]} is {printable(meta.get(wrong[0]))}")
    check_noise(meta["scheduler"], where)
    return {name: make_config(CONFIGS[name], values, where) for name, values in meta["configs"].items()}


def load_model(
    folder: str | Path | ModelFolder,
    components: tuple[str, ...] = tuple(COMPONENTS),
    *,
    dtype=None,
    shardings=None,
) -> tuple[dict[str, tree.Params], dict, dict]:
    """Reads networks of a model folder, each array directly to its devices.

    Args:
      folder: the model folder.
      components: names of the networks.
      dtype: dtype of every parameter; None keeps the stored one.
      shardings: `{component: sharding or tree of shardings like its parameters}` for some or all components, or one
        sharding for everything; default: the first local device.

    Returns:
      params: `{component: nested dict of jax.Array}`.
      configs, meta: fields of `ModelFolder`.

    Raises:
      WeightsError: as for `read_model`, and if a component is not in the folder, does not fit its config or is damaged.
    """
    model = read_model(folder)
    folder, configs, meta = model.path, model.configs, model.meta
    absent = [name for name in components if name not in meta["components"]]
    if absent:
        raise WeightsError(f"{folder} has no {', '.join(absent)}, only {', '.join(meta['components'])}")
    by_name = shardings if isinstance(shardings, dict) else dict.fromkeys(components, shardings)
    params = {}
    for name in components:
        folder = model.home(name).absolute()
        prints = fingerprints.recorded(folder)
        late = name in prints and dtype is not None and np.dtype(dtype).name not in fingerprints.CASTS
        params[name] = _sound(folder / name, name, configs[name], None if late else dtype, by_name.get(name))
        if name in prints:
            fingerprints.verify(params[name], prints[name], folder / name)
        if late:  # there is no fingerprint of this cast
            params[name] = jax.tree.map(lambda x: x.astype(dtype), params[name])
    return params, configs, meta


def _sound(path: Path, *args) -> tree.Params:
    """Returns `_restore(path, ...)`; raises WeightsError if the files of the tree are damaged."""
    try:
        return _restore(path, *args)
    except (WeightsError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # broken files make orbax, tensorstore and json raise errors of many kinds
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise WeightsError(f"{path} is damaged ({reason}): convert the model again") from error


def _restore(path: Path, name: str, config, dtype, sharding) -> tree.Params:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    packed = path.with_name(f"{name}.safetensors")
    if packed.is_file():
        stored = open_weights(packed)
        shapes = _check(name, {k: stored.shape(k) for k in stored.names()}, config, "stored parameters")
        params = tree.unflatten({k: stored.read(k) for k in tree.flatten(shapes)})
        params = params if dtype is None else jax.tree.map(lambda x: x.astype(dtype), params)
        return jax.device_put(params, sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        shapes = _check(name, {k: tuple(v.shape) for k, v in tree.flatten(stored).items()}, config, "stored parameters")
        if isinstance(sharding, jax.sharding.Sharding):
            sharding = jax.tree.map(lambda _: sharding, shapes)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), stored, sharding
        )
        return checkpointer.restore(path, target)


def encoders_identity(meta: dict) -> str:
    """Returns the identity of a model folder's VAE and CLIP tower: the digests of their original weight files.

    Args:
      meta: content of `model.json`; the result is "" if it contains no digests.
    """
    digests = meta.get("source", {}).get("sha256", {})
    names = ("vae/", "image_encoder/")
    return "+".join(sorted(d for file, d in digests.items() if file.startswith(names) and "config" not in file))


def load_codec(folder: str | Path | ModelFolder, **kw) -> SVDCodec | PatchCodec:
    """Loads the codec of a model folder; `kw` (dtype, shardings) as for `load_model`."""
    model = read_model(folder)
    if model.meta["codec"] == "patch":
        return model.configs["codec"]
    params, configs, _ = load_model(model, ("vae", "image_encoder"), **kw)
    return SVDCodec(configs["vae"], configs["image_encoder"], params)

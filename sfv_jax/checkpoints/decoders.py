"""Tiny decoders on disk, and the check that one belongs to the latent space of a model.

    MODEL/tiny_decoder/config.json         sizes, latent space, origin
    MODEL/tiny_decoder/model.safetensors   weights under our names, torch's axes

A folder of this kind may lie anywhere; inside a model folder it is what `--decoder tiny` means. A file with TAESDV's
names is read, too; a tiny decoder decodes the latents of one VAE only, so what is known of that VAE is recorded.

The decoders in the package (checkpoints/box.py) are packed model folders whose `model.json` names their encoders:

    world-decoder/model.json  tiny_decoder.safetensors  fingerprints.json
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfv_jax.checkpoints import box, fingerprints
from sfv_jax.checkpoints.base import Base
from sfv_jax.checkpoints.model_folder import ModelFolder, load_model, read_model, save_model
from sfv_jax.checkpoints.run import read_config, restore_ema
from sfv_jax.choices import TINY_DECODER
from sfv_jax.models import tree
from sfv_jax.models.codec import SVDCodec
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.models.vae import VAEConfig
from sfv_jax.runtime.files import sha256, write_json
from sfv_jax.weights.components import is_number, make_config
from sfv_jax.weights.folders import WeightsError, new_folder, read_json, refuse_existing
from sfv_jax.weights.reader import Tensors, open_weights
from sfv_jax.weights.taesdv import our_names, present, read_decoder, taesdv_config, taesdv_names
from sfv_jax.weights.writer import write_safetensors

FOLDER, WEIGHTS, CONFIG = TINY_DECODER, "model.safetensors", "config.json"
CLASS = "TinyTemporalDecoder"
SCALE = 0.18215  # of TAESDV's latents
METADATA = "latent_space"  # key in the header of an exported file


@dataclass(frozen=True)
class LatentSpace:
    """What is known of the VAE whose latents a decoder decodes.

    Attributes:
      scaling_factor: factor of the latents.
      identities: digests by which the VAE can be recognized, of its files or of its parameters; () if none is known.
    """

    scaling_factor: float = SCALE
    identities: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredDecoder:
    """A tiny decoder that was read.

    Attributes:
      path: where it was found.
      config: its sizes.
      params: its parameters, fp32.
      space: its latent space.
      origin: how it was made, for records.
    """

    path: Path
    config: TinyDecoderConfig
    params: tree.Params
    space: LatentSpace
    origin: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Returns the JSON description of the decoder for the record of a video."""
        path = box.name_of(self.path) or str(self.path)
        return {"path": path, "parameters": tree.count(self.params)} | self.origin


def latent_space(model: ModelFolder) -> LatentSpace:
    """Returns the latent space of a model folder.

    Two folders have the same VAE if its weight files have the same digests, or its stored parameters the same
    checksums; the one survives a change of dtype, the other a change of the file format.
    """
    digests = model.meta.get("source", {}).get("sha256", {})
    files = sorted(d for name, d in digests.items() if name.startswith("vae/") and "config" not in name)
    prints = fingerprints.recorded(model.home("vae")).get("vae")
    known = [f"files:{'+'.join(files)}"] if files else []
    if prints:
        text = json.dumps({path: prints[path].get("float32") for path in sorted(prints)})
        known.append(f"weights:{hashlib.sha256(text.encode()).hexdigest()}")
    return LatentSpace(model.config("vae").scaling_factor, tuple(known))


def check_space(decoder: StoredDecoder, model: ModelFolder) -> None:
    """Checks that a decoder decodes the latents of a model; identities that are not known are not compared.

    Raises:
      WeightsError: if it does not; one line with what differs.
    """
    vae: VAEConfig = model.configs["vae"]
    ours, theirs = latent_space(model), decoder.space
    facts = {
        "latent channels": (decoder.config.latent_channels, vae.latent_channels),
        "pixels per latent cell": (decoder.config.downscale, vae.downscale),
        "channels of a frame": (decoder.config.out_channels, vae.out_channels),
        "as the scale of latents": (theirs.scaling_factor, ours.scaling_factor),
    }
    for what, (its, mine) in facts.items():
        if its != mine:
            raise WeightsError(
                f"{decoder.path} decodes another latent space: it has {its} {what}, the VAE of {model.path} {mine}; "
                "distill a decoder for this model (configs/decoder.py)"
            )
    if theirs.identities and ours.identities and not {*theirs.identities} & {*ours.identities}:
        raise WeightsError(
            f"{decoder.path} was distilled from another VAE than that of {model.path}: distill one for this model "
            f"(configs/decoder.py), or empty latent_space.identities in its {CONFIG} if the two only differ in format"
        )


def choose_decoder(name: str, base: Base, *, allow_pickle: bool = False) -> StoredDecoder | None:
    """Returns the decoder that `--decoder` names for a loaded model; None for the VAE's own.

    Args:
      name: "full", or as for `find_decoder`.
      base: the model.
      allow_pickle: also read `.pth` files, as `weights.reader.open_weights` does.

    Raises:
      WeightsError: if there is no such decoder, or it decodes another latent space.
    """
    if name == "full":
        return None
    if base.model is None or not isinstance(base.codec, SVDCodec):
        raise WeightsError(f"decoder {name!r}: this model has the patch codec, which has no decoder network")
    return find_decoder(name, base.model, allow_pickle=allow_pickle)


def find_decoder(name: str, model: ModelFolder, *, allow_pickle: bool = False) -> StoredDecoder:
    """Returns a tiny decoder of the latents of `model`, which has a VAE.

    Args:
      name: "tiny" for that of the model, see `own_decoder`; else a file, a folder, the workdir of a run, or the name of
        a decoder in the package.
      model: the model folder.
      allow_pickle: also read `.pth` files, as `weights.reader.open_weights` does.

    Raises:
      WeightsError: if there is no such decoder, or it decodes another latent space.
    """
    path = own_decoder(model) if name == "tiny" else Path(name)
    if path is None:
        folder = model.home("vae")
        raise WeightsError(
            f"decoder 'tiny': {folder} has no {FOLDER}; train one (configs/decoder.py) and put it there: "
            f"python -m sfv_jax.convert --src RUN --dst {folder / FOLDER}"
        )
    found = read_tiny(path, allow_pickle=allow_pickle)
    check_space(found, model)
    return found


def own_decoder(model: ModelFolder) -> Path | None:
    """Returns the place of a model's tiny decoder: beside its VAE, or in the package if the VAE is there; or None."""
    folder = model.home("vae")
    return folder / FOLDER if (folder / FOLDER).is_dir() else box.decoder_of(folder)


def is_decoder_run(path: Path) -> bool:
    """Returns whether `path` is the workdir of a run that trains a tiny decoder."""
    return (path / "decoder.json").is_file()


def describe_decoder_run(workdir: Path, config: TinyDecoderConfig, model: ModelFolder) -> None:
    """Writes `workdir/decoder.json`, with which a decoder is read from the checkpoints of its run."""
    write_json(workdir / "decoder.json", _description(config, latent_space(model), {"model": model.path.name}))


def read_tiny(path: Path, *, raw: bool = False, allow_pickle: bool = False) -> StoredDecoder:
    """Reads a decoder.

    Args:
      path: a folder as above, the workdir of a run, a file under TAESDV's names (or that of such a folder), or the name
        of a decoder in the package.
      raw: read the trained weights of a run instead of their moving average.
      allow_pickle: also read `.pth` files, only their tensors.

    Raises:
      WeightsError: if it is none of these, or damaged.
      WorkdirError: if the run has no checkpoint yet.
    """
    path = box.located(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: name a tiny decoder's folder or file, or the run that trains it")
    if is_decoder_run(path):
        config, space, origin = _described(path / "decoder.json")
        part = "generator" if raw else "ema"
        params, step = restore_ema(path, tree.abstract(TinyTemporalDecoder, config)[1], name=part)
        params = {k: v for k, v in params.items() if k != "projectors"}
        return StoredDecoder(path, config, params, space, origin | {"run": path.resolve().name, "step": step})
    if (path / f"{FOLDER}.safetensors").is_file():
        return _read_packed(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / CONFIG).is_file():
        raise WeightsError(f"{path} is neither a tiny decoder's folder nor a run that trains one: it has no {CONFIG}")
    if path.is_dir() or (path.name == WEIGHTS and (folder / CONFIG).is_file()):
        config, space, origin = _described(folder / CONFIG)
        tensors = open_weights(folder / WEIGHTS)
        digest = sha256(folder / WEIGHTS)
        if origin.setdefault("sha256", digest) != digest:
            raise WeightsError(f"{folder / WEIGHTS} is damaged: it is not the file of {CONFIG}; restore it from a copy")
        return StoredDecoder(path, config, read_decoder(tensors, our_names(config), config), space, origin)
    tensors = open_weights(path, allow_pickle)
    config = taesdv_config(tensors)
    params = read_decoder(tensors, taesdv_names(config), config)
    return StoredDecoder(path, config, params, _space_of(tensors), {"sha256": sha256(path)})


def _read_packed(folder: Path) -> StoredDecoder:
    """Reads the decoder of a packed model folder."""
    model = read_model(folder)
    params, configs, meta = load_model(model, (FOLDER,), dtype=np.float32)
    run = {k: v for k, v in meta.get("run", {}).items() if k == "step"}
    origin = run | {"sha256": sha256(folder / f"{FOLDER}.safetensors")}
    arrays = jax.tree.map(np.asarray, params[FOLDER])
    return StoredDecoder(folder, configs[FOLDER], arrays, latent_space(model), origin)


def _space_of(tensors: Tensors) -> LatentSpace:
    """Returns the latent space in the header of a file; that of SD and SVD by its scale if there is none."""
    text = tensors.metadata.get(METADATA)
    try:
        return LatentSpace() if text is None else _space(json.loads(text), tensors.where())
    except ValueError as error:
        raise WeightsError(f"{tensors.where()}: {METADATA} in its header is damaged") from error


def _space(content: Any, where: str) -> LatentSpace:
    content = content if isinstance(content, dict) else {}
    scale, known = content.get("scaling_factor"), content.get("identities")
    if not is_number(scale) or scale <= 0 or not isinstance(known, list) or not all(isinstance(x, str) for x in known):
        raise WeightsError(f"{where} is damaged: latent_space needs a scaling_factor and a list of identities")
    return LatentSpace(scale, tuple(known))


def _description(config: TinyDecoderConfig, space: LatentSpace, origin: dict) -> dict:
    return {
        "_class_name": CLASS,
        "config": dataclasses.asdict(config),
        "latent_space": dataclasses.asdict(space),
        "origin": origin,
    }


def _described(path: Path) -> tuple[TinyDecoderConfig, LatentSpace, dict]:
    """Returns what `_description` wrote to `path`."""
    content = read_json(path, "restore it from a copy, or write the decoder again (python -m sfv_jax.convert)")
    if content.get("_class_name") != CLASS:
        raise WeightsError(f"{path} describes no tiny decoder: its _class_name is {content.get('_class_name')!r}")
    if not isinstance(content.get("origin"), dict):
        raise WeightsError(f"{path} is damaged: origin is no object")
    config = make_config(TinyDecoderConfig, content.get("config"), f"{path}: config")
    return config, _space(content.get("latent_space"), str(path)), content["origin"]


def save_tiny(
    dst: str | Path,
    config: TinyDecoderConfig,
    params: tree.Params,
    space: LatentSpace,
    origin: dict | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a decoder's folder, completely or not at all.

    Raises:
      WeightsError: if `dst` exists and `overwrite` is not set.
    """
    shapes, tensors = present(params, our_names(config))
    with new_folder(dst, overwrite=overwrite) as partial:
        write_safetensors(partial / WEIGHTS, shapes, tensors, np.dtype(np.float32))
        about = (origin or {}) | {"sha256": sha256(partial / WEIGHTS)}
        write_json(partial / CONFIG, _description(config, space, about))


def import_decoder(
    src: str | Path,
    dst: str | Path,
    *,
    base: str | Path | None = None,
    raw: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> StoredDecoder:
    """Writes the decoder `src` as a folder, such as `MODEL/tiny_decoder`.

    Args:
      src: as for `read_tiny`.
      dst: the folder to write.
      base: model folder whose latents the decoder decodes; by default that in which `dst` lies, if any. A decoder whose
        file has no record of its VAE gets that of this model.
      raw, allow_pickle: as for `read_tiny`.
      overwrite: replace an existing `dst`.

    Raises:
      WeightsError: if `src` is no decoder, or one of another latent space.
    """
    refuse_existing(Path(dst), overwrite)
    found = read_tiny(Path(src), raw=raw, allow_pickle=allow_pickle)
    parent = Path(dst).absolute().parent
    folder = base or (parent if (parent / "model.json").is_file() else None)
    space = found.space
    if folder:
        model = read_model(folder)
        if "vae" not in model.configs:
            raise WeightsError(f"{folder} has the patch codec: there is no VAE whose latents could be decoded")
        check_space(found, model)
        space = space if space.identities else latent_space(model)
    origin = {k: v for k, v in found.origin.items() if k != "sha256"} | {"source": Path(src).resolve().name}
    save_tiny(dst, found.config, found.params, space, origin, overwrite=overwrite)
    return dataclasses.replace(found, space=space)


def pack_decoder(
    src: str | Path, dst: str | Path, *, raw: bool = False, fp16: bool = False, overwrite: bool = False
) -> None:
    """Writes the decoder of a run as a packed model folder, which names the encoders in the package that it belongs to.

    Args:
      src: the workdir of the run.
      dst: the folder to write.
      raw: take the trained weights instead of their moving average.
      fp16: write half precision.
      overwrite: replace an existing `dst`.

    Raises:
      WeightsError: if its VAE is not in the package, or `dst` exists.
      WorkdirError: if the run has no checkpoint yet.
    """
    refuse_existing(Path(dst), overwrite)
    found = read_tiny(Path(src), raw=raw)
    known = {name: read_model(name) for name in box.DECODERS if name in box.NAMES}
    fitting = [name for name, model in known.items() if {*latent_space(model).identities} & {*found.space.identities}]
    if not fitting:
        raise WeightsError(
            f"{src} was distilled from a VAE that is not in the package ({', '.join(known)}): write it to "
            f"MODEL/{FOLDER} instead, without --export"
        )
    source = {"sha256": known[fitting[0]].meta["source"]["sha256"]}
    run = {"step": found.origin["step"], "raw": raw, "config": read_config(Path(src))}
    extra = {"source": source, "encoders": fitting[0], "run": run}
    packed = "float16" if fp16 else "float32"
    save_model(dst, {FOLDER: found.params}, {FOLDER: found.config}, extra=extra, packed=packed, overwrite=overwrite)


def export_decoder(src: str | Path, dst: str | Path, *, raw: bool = False, fp16: bool = False) -> None:
    """Writes the decoder `src` (as for `read_tiny`) to one safetensors file under TAESDV's names."""
    found = read_tiny(Path(src), raw=raw)
    shapes, tensors = present(found.params, taesdv_names(found.config))
    metadata = {METADATA: json.dumps(dataclasses.asdict(found.space))}
    write_safetensors(Path(dst), shapes, tensors, np.dtype(np.float16 if fp16 else np.float32), metadata)

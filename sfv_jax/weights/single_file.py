"""Strict reader and writer of Stability's single file of all three networks (its names: `sgm`)."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.models import tree
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.runtime.files import parse_json
from sfv_jax.weights import sgm
from sfv_jax.weights.components import COMPONENTS, make_config, to_json
from sfv_jax.weights.diffusers import lazy_params, manifest, reader
from sfv_jax.weights.folders import WeightsError, refuse_existing, shape_problems
from sfv_jax.weights.pipeline import check_noise
from sfv_jax.weights.reader import FLOATS, Tensor, Tensors
from sfv_jax.weights.writer import Shapes, write_safetensors

# Config fields that no tensor's shape determines; stored in the header of the files we write.
UNTOLD = {
    "unet": ("num_attention_heads", "num_frames", "sample_size"),
    "vae": ("scaling_factor", "sample_size"),
    "image_encoder": ("num_attention_heads",),
}
# The field with which `UNTOLD` fields of another model hold here too.
WIDTHS = {"unet": "block_out_channels", "vae": "block_out_channels", "image_encoder": "hidden_size"}
HEAD_DIM = {"unet": 64, "image_encoder": 80}  # of SVD; used where the header lacks the number of heads
# Patterns of tensors that none of our networks has, with the reason to report.
IGNORED = {
    r"conditioner\.embedders\.0\.open_clip\.(?!model\.visual\.)": "CLIP's text side",
    r"conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\.": "the conditioner's decoder",
    r"(first_stage_model|conditioner\.embedders\.3\.encoder)\.(loss|model_ema)\.": "training state of the VAE",
    r"model_ema\.": "moving average of the training, beside the weights themselves",
    r"denoiser\.sigmas$": "table of noise levels",
    r".*\.position_ids$": "positions of CLIP's embedding, which are constants",
}
# Beginnings of the names of each network; a whole file has them all.
OWNERS = {
    "unet": (sgm.UNET,),
    "vae": (f"{sgm.FIRST_STAGE}decoder.", f"{sgm.FIRST_STAGE}encoder.", sgm.CONDITIONER),
    "image_encoder": (sgm.CLIP,),
}


def save_single_file(
    path: str | Path,
    load: Callable[[str], tree.Params],
    configs: dict,
    *,
    variant: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one file with the names of the original, complete or not at all.

    Args:
      path: a name that ends in `.safetensors`.
      load: function from the name of a component to its parameters; called once per component, so that memory holds
        one component at a time.
      configs: our configs of all three components by name.
      variant: "fp16" for half precision, None for fp32.
      overwrite: replace an existing file.
    Raises:
      WeightsError: if the file exists, its name ends otherwise, or the format cannot express the networks.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the name of a single file must end in .safetensors")
    refuse_existing(path, overwrite)
    for name in COMPONENTS:
        to_json(name, configs[name])  # the limits of diffusers apply here too
    shapes: Shapes = {}
    for name in COMPONENTS:
        for where in _parts(name, configs[name]):
            shapes |= sgm.shapes_there(name, configs[name], where)
    tensors = (pair for name in COMPONENTS for pair in _tensors(name, load(name), configs[name]))
    extra = {name: {field: getattr(configs[name], field) for field in UNTOLD[name]} for name in COMPONENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.float16 if variant == "fp16" else np.float32)
    # The product is exact only in fp32: rounding it would cost as much as rounding all of the encoder.
    wide = {name for name in shapes if name.startswith(f"{sgm.FIRST_STAGE}encoder.conv_out.")}
    write_safetensors(path, shapes, tensors, dtype, {"sfv_jax": json.dumps(extra)}, wide=wide)


def _parts(component: str, config) -> list[dict[str, sgm.Place]]:
    """Returns the places of a component, and for the VAE also those of the encoder's copy."""
    where = sgm.places(component, config)
    if component != "vae":
        return [where]
    copy = sgm.places(component, config, first_stage_encoder=True)
    return [where, {name: place for name, place in copy.items() if name.startswith("encoder.")}]


def _tensors(component: str, params: tree.Params, config) -> Iterator[tuple[str, np.ndarray]]:
    _, read = reader(component, params, config)
    for n, where in enumerate(_parts(component, config)):
        yield from sgm.from_diffusers(where, read if n == 0 else lambda name: _without_quant_conv(name, read))


def _without_quant_conv(name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns tensor `name` of an encoder whose last convolution includes `quant_conv`."""
    value = read(name)
    if not name.startswith("encoder.conv_out."):
        return value
    mix = read("quant_conv.weight")[:, :, 0, 0].astype(np.float64)
    product = np.tensordot(mix, value.astype(np.float64), axes=1)
    return (product + read("quant_conv.bias") if name.endswith(".bias") else product).astype(np.float32)


# Reading


@dataclass(frozen=True)
class SingleFile:
    """A single file whose names and shapes have been checked.

    Attributes:
      tensors: the stored tensors, with the names of a whole file.
      configs: our configs of the components that it contains, by name.
      places: for each of them, the places of diffusers' tensors by name.
      notes: lines for the user about assumptions and omitted tensors.
    """

    tensors: Tensors
    configs: dict
    places: dict[str, dict[str, sgm.Place]]
    notes: list[str]


def components_there(tensors: Tensors) -> list[str]:
    """Returns the components that have the names of the original, with or without the prefix of a whole file."""
    names = list(_canonical(tensors).entries)
    return [component for component, starts in OWNERS.items() if any(name.startswith(starts) for name in names)]


def _canonical(tensors: Tensors) -> Tensors:
    try:
        return tensors.renamed(sgm.canonical(tensors.names()))
    except ValueError as error:
        raise WeightsError(f"{tensors.where()}: {error}") from error


def open_single_file(
    tensors: Tensors, *, num_frames: int | None = None, base: Mapping[str, Any] | None = None
) -> SingleFile:
    """Infers the networks of a file from its names and shapes, and checks every tensor.

    Args:
      tensors: the tensors of a file with the names of the original: of all networks, or of some.
      num_frames: frames of the clips on which the UNet was trained, which no shape determines; default: the number in
        the header of a file that we wrote, else that of `base`, else 25 if the file's name contains "xt", else 14.
      base: configs by component, for other fields that no shape determines, where the widths agree.
    Raises:
      WeightsError: if it is not such a file; lists every tensor that is missing, unexpected or misshapen.
    """
    where, stem = tensors.where(), tensors.files[0].stem
    tensors = _canonical(tensors)
    there = components_there(tensors)
    if not there:
        raise WeightsError(f"{where} is not a single file of SVD: no tensor begins with {sgm.UNET}")
    tensors = _without_noise_levels(tensors)
    shapes = {name: tensors.shape(name) for name in tensors.names()}
    if "vae" in there and f"{sgm.FIRST_STAGE}decoder.conv_out.time_mix_conv.weight" not in shapes:
        raise WeightsError(f"{where} has no temporal decoder: take the file without image_decoder in its name")
    notes: list[str] = []
    told = _told(tensors)
    configs = {name: _infer(name, shapes, told[name], (base or {}).get(name), where) for name in there}
    if "unet" in there:
        frames = num_frames or _frames(told["unet"], (base or {}).get("unet"), stem, notes)
        configs["unet"] = dataclasses.replace(configs["unet"], num_frames=frames)
    bare = "vae" in there and sgm.CONDITIONER + "encoder.conv_in.weight" not in shapes
    if bare:
        notes.append("the encoder of the first stage, with an identity as quant_conv: the file has no other")
    renamed = f"{sgm.CLIP}vision_model.embeddings.class_embedding" in shapes
    places = {
        name: sgm.places(name, config, first_stage_encoder=bare, transformers=renamed)
        for name, config in configs.items()
    }
    copy: set[str] = set()
    if "vae" in there:
        copy = {place.name for place in sgm.places("vae", configs["vae"], first_stage_encoder=True).values()}
    expected = {k: v for name in configs for k, v in sgm.shapes_there(name, configs[name], places[name]).items()}
    notes += _account(shapes, expected, copy, tensors)
    notes += _compare_encoders(tensors, configs["vae"], copy & shapes.keys()) if "vae" in there and not bare else []
    return SingleFile(tensors, configs, places, notes)


def _frames(told: dict, base: UNetConfig | None, stem: str, notes: list[str]) -> int:
    """Returns the frames of the clips of training; adds a line to `notes` where the file's name decides."""
    if "num_frames" in told:
        return told["num_frames"]
    if base is not None:
        return base.num_frames
    frames = 25 if "xt" in stem else 14
    notes.append(f"{frames} frames, inferred from the name {stem}; --num_frames overrides this")
    return frames


def _without_noise_levels(tensors: Tensors) -> Tensors:
    """Returns `tensors` without the scalars sigma_max and sigma_min of ComfyUI, after comparing them with SVD's."""
    levels = [name for name in tensors.names() if name.startswith(sgm.SIGMA)]
    for name in levels:
        value = tensors.read(name).ravel() if tensors.shape(name) in ((), (1,)) else np.zeros(0)
        found = float(value[0]) if value.size and tensors.dtype(name) in FLOATS else tensors.shape(name)
        check_noise({name.removeprefix(sgm.SIGMA): found}, tensors.where())
    return tensors.renamed({name: name for name in tensors.names() if name not in levels})


def lazy_single_file(single: SingleFile, component: str, dtype=None) -> tree.Params:
    """Returns the parameters of one component as a nested dict of `Lazy` leaves; see `diffusers.lazy_params`."""
    config, there, where = single.configs[component], single.tensors, single.places[component]
    entries = {}
    for name, shape in manifest(component, config).items():
        if name in where:
            load = partial(sgm.to_diffusers, where[name], there.read)
            first = there.entries[where[name].name]
        else:  # the encoder of the first stage has no quant_conv
            first = there.entries[where["encoder.conv_out.bias"].name]
            load = partial(_identity, shape, first)
        entries[name] = dataclasses.replace(first, shape=shape, load=load)
    return lazy_params(dataclasses.replace(there, entries=entries), component, config, dtype)


def _identity(shape: tuple[int, ...], like: Tensor) -> np.ndarray:
    """Returns weight `[o, i, 1, 1]` or bias `[o]` of an identity convolution in the dtype of `like`."""
    dtype = like.load().dtype
    return np.zeros(shape, dtype) if len(shape) == 1 else np.eye(shape[0], dtype=dtype).reshape(shape)


def _told(tensors: Tensors) -> dict[str, dict]:
    """Returns the `UNTOLD` fields of each component that the header contains."""
    try:
        entry = parse_json(tensors.metadata.get("sfv_jax", "{}").encode())
        return {name: {k: entry[name][k] for k in UNTOLD[name] if k in entry.get(name, {})} for name in UNTOLD}
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{tensors.where()}: the entry sfv_jax of its header is broken") from error


def _infer(component: str, shapes: Shapes, told: dict, base, where: str):
    """Returns the config of a component; fields that no shape determines are those told, else those of `base`."""
    infer = {"unet": _unet, "vae": _vae, "image_encoder": _clip}[component]
    try:
        inferred = infer(shapes)
        width = WIDTHS[component]
        alike = base is not None and getattr(base, width) == inferred[width]
        untold = {field: getattr(base, field) for field in UNTOLD[component]} if alike else {}
        if component in HEAD_DIM and "num_attention_heads" not in told | untold:
            inferred |= {"num_attention_heads": _heads(component, inferred)}
    except KeyError as error:
        raise WeightsError(f"{where} is not a single file of SVD: it has no {error.args[0]}") from error
    except (ValueError, IndexError, TypeError) as error:
        raise WeightsError(f"{where} does not fit the networks of SVD: {error}") from error
    return make_config(COMPONENTS[component].config, inferred | untold | told, where)


def _account(shapes: Shapes, expected: Shapes, copy: set[str], tensors: Tensors) -> list[str]:
    """Returns notes on the tensors that `IGNORED` covers; raises WeightsError if any other tensor does not fit."""
    rest, notes = shapes.keys() - expected.keys() - copy, []
    for pattern, reason in IGNORED.items():
        ignored = {name for name in rest if re.match(pattern, name)}
        rest -= ignored
        notes += [f"left out {len(ignored)} tensors: {reason}"] if ignored else []
    found = {name: shapes[name] for name in shapes if name in expected or name in rest}
    problems = shape_problems(found, expected)
    dtypes = {name: tensors.dtype(name) for name in found if name in expected}
    problems += [f"not floating point: {name} is {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    if problems:
        raise WeightsError(f"{tensors.where()} does not fit the networks of SVD:\n  " + "\n  ".join(problems))
    return notes


def _heads(component: str, inferred: dict):
    widths = inferred["block_out_channels"] if component == "unet" else (inferred["hidden_size"],)
    if any(width % HEAD_DIM[component] for width in widths):
        unknown = f"the number of attention heads of {component} cannot be inferred from its widths {widths}"
        raise ValueError(f"{unknown}: pass --base MODEL_FOLDER, a converted model of the same sizes")
    heads = tuple(width // HEAD_DIM[component] for width in widths)
    return heads if component == "unet" else heads[0]


def _unet(shapes: Shapes) -> dict:
    """Infers the config from the levels: each but the last ends with a downsampler, all have as many resnets."""
    at = {name.removeprefix(sgm.UNET): shape for name, shape in shapes.items()}
    numbers = (re.match(r"input_blocks\.(\d{1,3})\.", name) for name in at)
    blocks = 1 + max((int(number[1]) for number in numbers if number), default=0)
    samplers = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in at]
    layers = (samplers[0] if samplers else blocks) - 1
    starts = [1, *(n + 1 for n in samplers)]
    channels = tuple(at[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in starts)
    return dict(
        in_channels=at["input_blocks.0.0.weight"][1],
        out_channels=at["out.2.weight"][0],
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=at["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        addition_time_embed_dim=at["label_emb.0.0.weight"][1] // 3,
    )


def _vae(shapes: Shapes) -> dict:
    prefixes = (f"{sgm.CONDITIONER}encoder.", f"{sgm.FIRST_STAGE}encoder.")
    prefix = next((p for p in prefixes if f"{p}conv_in.weight" in shapes), prefixes[0])
    first = f"{prefix}down.{{}}.block.{{}}.conv1.weight"
    levels = _count(lambda n: first.format(n, 0) in shapes)
    return dict(
        in_channels=shapes[f"{prefix}conv_in.weight"][1],
        out_channels=shapes[f"{sgm.FIRST_STAGE}decoder.conv_out.weight"][0],
        block_out_channels=tuple(shapes[first.format(n, 0)][0] for n in range(levels)),
        layers_per_block=_count(lambda n: first.format(0, n) in shapes),
        latent_channels=shapes[f"{sgm.FIRST_STAGE}decoder.conv_in.weight"][1],
    )


def _clip(shapes: Shapes) -> dict:
    """Infers the config from open_clip's names, or from those of transformers."""
    at = {name.removeprefix(sgm.CLIP): shape for name, shape in shapes.items()}
    layer, embeddings = "vision_model.encoder.layers.{}.", "vision_model.embeddings."
    if f"{embeddings}class_embedding" in at:
        first, norm, wide = f"{embeddings}class_embedding", "layer_norm1.weight", "mlp.fc1.weight"
        conv, positions = f"{embeddings}patch_embedding.weight", f"{embeddings}position_embedding.weight"
        projection = at["visual_projection.weight"][0]
    else:
        layer, first, norm, wide = "transformer.resblocks.{}.", "class_embedding", "ln_1.weight", "mlp.c_fc.weight"
        conv, positions = "conv1.weight", "positional_embedding"
        projection = at["proj"][1]
    return dict(
        hidden_size=at[first][0],
        intermediate_size=at[layer.format(0) + wide][0],
        num_hidden_layers=_count(lambda n: layer.format(n) + norm in at),
        patch_size=at[conv][-1],
        image_size=at[conv][-1] * math.isqrt(at[positions][0] - 1),
        projection_dim=projection,
    )


def _count(there: Callable[[int], bool]) -> int:
    return next(n for n in itertools.count() if not there(n))


def _compare_encoders(tensors: Tensors, config: VAEConfig, copy: set[str]) -> list[str]:
    """Returns one line if the first stage's encoder differs from the conditioner's, which diffusers and we use."""
    where = sgm.places("vae", config)
    different = []

    def read(name: str) -> np.ndarray:
        return sgm.to_diffusers(where[name], tensors.read)

    for name, place in where.items():
        twin = place.name.replace(sgm.CONDITIONER, sgm.FIRST_STAGE)
        if not name.startswith("encoder.") or twin not in copy:
            continue
        found = tensors.read(twin)
        if not name.startswith("encoder.conv_out."):
            same = found.tobytes() == tensors.read(place.name).tobytes()
        else:  # the product with quant_conv, of factors that are rounded to the file's precision
            expected = _without_quant_conv(name, read)
            half = any(tensors.read(other).dtype.itemsize < 4 for other in (twin, place.name))
            tolerance = 1e-2 if half else 1e-5
            same = found.shape == expected.shape
            same = same and np.abs(found.astype(np.float32) - expected).max() <= tolerance * np.abs(expected).max()
        different += [] if same else [twin]
    if not different:
        return []
    return [f"the encoder of the conditioner; that of the first stage differs in {len(different)}: {different[0]}, ..."]

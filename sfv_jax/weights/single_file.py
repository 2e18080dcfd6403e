"""Stability's single file of all three networks, in and out (names: `sgm`), every tensor accounted for."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights import sgm
from sfv_jax.weights.configs import COMPONENTS, to_json
from sfv_jax.weights.diffusers import FLOATS, reader, their_name, to_ours
from sfv_jax.weights.folders import WeightsError, refuse_existing, shape_problems
from sfv_jax.weights.stream import Shapes, write_safetensors

# What no shape tells, kept in the header of the files we write.
UNTOLD = {
    "unet": ("num_attention_heads", "num_frames", "sample_size"),
    "vae": ("scaling_factor", "sample_size"),
    "image_encoder": ("num_attention_heads",),
}
HEAD_DIM = {"unet": 64, "image_encoder": 80}  # of SVD, where the header does not say how many heads there are
# Tensors of a file that no network of ours has, with the reason that goes into the report.
IGNORED = {
    r"conditioner\.embedders\.0\.open_clip\.(?!model\.visual\.)": "CLIP's text side",
    r"conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\.": "the conditioner's decoder",
    r"(first_stage_model|conditioner\.embedders\.3\.encoder)\.(loss|model_ema)\.": "training state of the VAE",
    r"model_ema\.": "moving average of the training, beside the weights themselves",
    r"denoiser\.sigmas$": "table of noise levels",
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
      path: ending in `.safetensors`.
      load: gives the parameters of a component by name; called once for each, so that only one is held at a time.
      configs: of all three components.
      variant: "fp16" for half precision, None for fp32.
    Raises:
      WeightsError: if the file exists, its name ends otherwise, or the networks are none that this format can express.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the name of a single file must end in .safetensors")
    refuse_existing(path, overwrite)
    for name in COMPONENTS:
        to_json(name, configs[name])  # the same limits as diffusers has
    shapes: Shapes = {}
    for name in COMPONENTS:
        for where in _parts(name, configs[name]):
            shapes |= sgm.shapes_there(name, configs[name], where)
    tensors = (pair for name in COMPONENTS for pair in _tensors(name, load(name), configs[name]))
    untold = {name: {field: getattr(configs[name], field) for field in UNTOLD[name]} for name in COMPONENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.float16 if variant == "fp16" else np.float32)
    write_safetensors(path, shapes, tensors, dtype, {"sfv_jax": json.dumps(untold)})


def _parts(component: str, config) -> list[dict[str, sgm.Place]]:
    """The places of a component, and for the VAE those of the encoder's copy."""
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
    """Tensor `name` of an encoder whose last convolution does the work of `quant_conv` too."""
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
      configs: of the three components.
      places: for each component, where diffusers' tensors lie.
      notes: lines for the user: what was assumed and what was left out.
    """

    path: Path
    configs: dict
    places: dict[str, dict[str, sgm.Place]]
    notes: list[str]


def is_single_file(path: str | Path) -> bool:
    """Whether `path` is a safetensors file with the UNet's names of the original."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with _open(path) as file:
        return any(name.startswith(sgm.UNET) for name in file.keys())


def open_single_file(path: str | Path, *, num_frames: int | None = None) -> SingleFile:
    """Finds the networks in a single file from its names and shapes alone.

    Args:
      num_frames: of the clips the UNet was trained on, which no tensor tells; default: what the header of a file of
        ours says, else 25 if the file's name has "xt" in it, else 14.
    Raises:
      WeightsError: if it is not such a file; lists every tensor that is missing, unexpected or misshapen.
    """
    path = Path(path)
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
        dtypes = {name: x.get_dtype() for name, x in slices.items()}
        told = json.loads((file.metadata() or {}).get("sfv_jax", "{}"))
    notes: list[str] = []
    configs = _infer(shapes, told, path)
    frames = num_frames or told.get("unet", {}).get("num_frames")
    if frames is None:
        frames = 25 if "xt" in path.stem else 14
        notes.append(f"{frames} frames, judged by the name {path.name}; --num_frames says otherwise")
    configs["unet"] = dataclasses.replace(configs["unet"], num_frames=frames)
    bare = sgm.CONDITIONER + "encoder.conv_in.weight" not in shapes
    if bare:
        notes.append("the encoder of the first stage, with an identity as quant_conv: the file has no other")
    places = {name: sgm.places(name, config, first_stage_encoder=bare) for name, config in configs.items()}
    expected = {k: v for name in configs for k, v in sgm.shapes_there(name, configs[name], places[name]).items()}
    copy = {place.name for place in sgm.places("vae", configs["vae"], first_stage_encoder=True).values()}
    rest = shapes.keys() - expected.keys() - copy
    for pattern, reason in IGNORED.items():
        ignored = {name for name in rest if re.match(pattern, name)}
        rest -= ignored
        notes += [f"left out {len(ignored)} tensors: {reason}"] if ignored else []
    problems = shape_problems({k: v for k, v in shapes.items() if k in expected or k in rest}, expected)
    problems += [f"not floating point: {k} is {dtypes[k]}" for k in expected if dtypes.get(k, "F32") not in FLOATS]
    if problems:
        raise WeightsError(f"{path} does not fit the networks of SVD:\n  " + "\n  ".join(problems))
    notes += [] if bare else _compare_encoders(path, configs["vae"], copy & shapes.keys())
    return SingleFile(path, configs, places, notes)


def load_single_file(single: SingleFile, component: str, dtype=None) -> tree.Params:
    """Parameters of one component, nested dict of numpy arrays in our layout, cast to `dtype` unless None."""
    where, flat = single.places[component], {}
    _, shapes = tree.abstract(COMPONENTS[component].module, single.configs[component])
    with _open(single.path) as file:
        for path, like in tree.flatten(shapes).items():
            place = where.get(their_name(path))
            if place is None:  # the encoder of the first stage has no quant_conv
                zeros = np.zeros_like(file.get_tensor(where["encoder.conv_out.bias"].name))
                value = zeros if path.endswith("bias") else np.diag(zeros + 1).reshape(like.shape)
            else:
                value = to_ours(path, sgm.to_diffusers(place, file.get_tensor))
            flat[path] = value if dtype is None else value.astype(dtype)
    return tree.unflatten(flat)


@contextmanager
def _open(path: Path):
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise WeightsError(f"{path} is absent, cut short or not a safetensors file ({error})") from error


def _infer(shapes: Shapes, told: dict, path: Path) -> dict:
    try:
        kinds = {"unet": (UNetConfig, _unet), "vae": (VAEConfig, _vae), "image_encoder": (CLIPConfig, _clip)}
        found = {}
        for name, (kind, infer) in kinds.items():
            untold = {k: tuple(v) if isinstance(v, list) else v for k, v in told.get(name, {}).items()}
            inferred = infer(shapes)
            if name in HEAD_DIM and "num_attention_heads" not in untold:
                inferred |= {"num_attention_heads": _heads(name, inferred)}
            found[name] = kind(**inferred | untold)
        return found
    except KeyError as error:
        raise WeightsError(f"{path} is not a single file of SVD: it has no {error.args[0]}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _heads(component: str, inferred: dict):
    widths = inferred["block_out_channels"] if component == "unet" else (inferred["hidden_size"],)
    if any(width % HEAD_DIM[component] for width in widths):
        raise ValueError(f"cannot tell how many attention heads {component} has, its widths being {widths}")
    heads = tuple(width // HEAD_DIM[component] for width in widths)
    return heads if component == "unet" else heads[0]


def _unet(shapes: Shapes) -> dict:
    """Levels end with a downsampler, except the last; all have as many resnets."""
    at = {name.removeprefix(sgm.UNET): shape for name, shape in shapes.items()}
    blocks = 1 + max(int(name.split(".")[1]) for name in at if name.startswith("input_blocks."))
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
    width, patch = shapes[f"{sgm.CLIP}class_embedding"][0], shapes[f"{sgm.CLIP}conv1.weight"][-1]
    return dict(
        hidden_size=width,
        intermediate_size=shapes[f"{sgm.CLIP}transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=_count(lambda n: f"{sgm.CLIP}transformer.resblocks.{n}.ln_1.weight" in shapes),
        patch_size=patch,
        image_size=patch * math.isqrt(shapes[f"{sgm.CLIP}positional_embedding"][0] - 1),
        projection_dim=shapes[f"{sgm.CLIP}proj"][1],
    )


def _count(there: Callable[[int], bool]) -> int:
    return next(n for n in itertools.count() if not there(n))


def _compare_encoders(path: Path, config: VAEConfig, copy: set[str]) -> list[str]:
    """One line if the first stage's encoder is another than the conditioner's, which diffusers and we take."""
    where = sgm.places("vae", config)
    names = {place.name: name for name, place in where.items() if name.startswith("encoder.")}
    different = []
    with _open(path) as file:

        def read(name: str) -> np.ndarray:
            return sgm.to_diffusers(where[name], file.get_tensor)

        for there, name in names.items():
            twin = there.replace(sgm.CONDITIONER, sgm.FIRST_STAGE)
            if twin not in copy:
                continue
            found, expected = file.get_tensor(twin), _without_quant_conv(name, read)
            if not name.startswith("encoder.conv_out."):
                same = found.tobytes() == expected.tobytes()
            else:  # a product, rounded to the file's precision
                tolerance = 1e-2 if found.dtype.itemsize < 4 else 1e-5
                same = np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
            different += [] if same else [twin]
    if not different:
        return []
    return [f"the encoder of the conditioner; that of the first stage differs in {len(different)}: {different[0]}, ..."]

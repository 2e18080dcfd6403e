"""The three components of SVD, and conversion of their configs from and to the `config.json` of their libraries."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from flax import nnx

from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.weights.folders import WeightsError, printable

DIFFUSERS_VERSION = "0.42.1"  # the version whose files ours equal
# Config fields of ours that diffusers lacks, with the constants that diffusers uses instead.
BUILT_IN = {"norm_groups": 32, "resnet_eps": 1e-6, "mid_eps": 1e-5}
# Limits of the fields of a config, so that a hostile file cannot describe a network that takes hours to build.
_LEVELS = 8
_MOST = {"layers_per_block": 8, "mid_layers": 64, "num_hidden_layers": 128, "num_frames": 4096, "decode_pixels": 2**40}
_MOST_ELSE = 2**15
_MAYBE_NONE = ("decode_pixels", "mid_layers")  # whole numbers that may be 0
_ANY_SIGN = ("offset", "noise_aug_strength")


@dataclass(frozen=True)
class Component:
    """A network of the pipeline: our module and config, and their names in the diffusers layout.

    Attributes:
      module, config: our classes.
      library, class_name: the package ("diffusers" or "transformers") and class of the same network.
      weights: name of the weight file up to the variant.
    """

    module: type[nnx.Module]
    config: type
    library: str
    class_name: str
    weights: str


COMPONENTS = {
    "unet": Component(UNet, UNetConfig, "diffusers", "UNetSpatioTemporalConditionModel", "diffusion_pytorch_model"),
    "vae": Component(TemporalVAE, VAEConfig, "diffusers", "AutoencoderKLTemporalDecoder", "diffusion_pytorch_model"),
    "image_encoder": Component(CLIPVision, CLIPConfig, "transformers", "CLIPVisionModelWithProjection", "model"),
}

# Fields never compared: no tensor depends on them, or they are checked elsewhere.
_FREE = {"_class_name", "_diffusers_version", "architectures", "force_upcast", "sample_size"}
# transformers omits fields that equal these defaults.
_CLIP_DEFAULTS: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    patch_size=32,
    image_size=224,
    projection_dim=512,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    model_type="clip_vision_model",
)


def to_json(component: str, config) -> dict:
    """Returns the `config.json` of `component` for one of our configs.

    Fields that only choose an implementation (`temporal_conv`, `attention_kernel`, `remat`, `decode_pixels`) are
    omitted.

    Raises:
      WeightsError: if a field that diffusers lacks differs from the constant that diffusers uses (`BUILT_IN`).
    """
    for field, value in BUILT_IN.items():
        if getattr(config, field, value) != value:
            found = getattr(config, field)
            raise WeightsError(f"{component}: {field} is {found}, diffusers has {value} built in")
    shared = {f.name: getattr(config, f.name) for f in fields(config)}
    shared = {k: list(v) if isinstance(v, tuple) else v for k, v in shared.items()}
    return {"unet": _unet_json, "vae": _vae_json, "image_encoder": _clip_json}[component](config, shared)


def _unet_json(config: UNetConfig, shared: dict) -> dict:
    plain = len(config.block_out_channels) - 1
    ours = BUILT_IN.keys() | {"temporal_conv", "attention_kernel", "remat"}
    return {
        "_class_name": COMPONENTS["unet"].class_name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * plain + ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * plain,
        "projection_class_embeddings_input_dim": 3 * config.addition_time_embed_dim,
        "transformer_layers_per_block": 1,
    } | {k: v for k, v in shared.items() if k not in ours}


def _vae_json(config: VAEConfig, shared: dict) -> dict:
    ours = BUILT_IN.keys() | {"temporal_conv", "decode_pixels"}
    return {
        "_class_name": COMPONENTS["vae"].class_name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.block_out_channels),
        "force_upcast": True,
    } | {k: v for k, v in shared.items() if k not in ours}


def _clip_json(config: CLIPConfig, shared: dict) -> dict:
    return {
        "architectures": [COMPONENTS["image_encoder"].class_name],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    } | shared


def from_json(component: str, data: dict, where: str):
    """Converts the content of a `config.json` to our config.

    Args:
      component: a key of `COMPONENTS`.
      data: the JSON object.
      where: the file's name, for error messages.
    Returns:
      An instance of the component's config class.
    Raises:
      WeightsError: if `data` describes another class or a network that ours cannot express; lists every such field.
    """
    expected = COMPONENTS[component]
    found = data.get("_class_name") or data.get("architectures") or "(no class name)"
    found = found[0] if isinstance(found, list) else found
    if found != expected.class_name:
        raise WeightsError(f"{where} describes a {printable(found)}, expected a {expected.class_name}")
    data = (_CLIP_DEFAULTS if component == "image_encoder" else {}) | data
    widths = data.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list) else 1
    given = [f for f in fields(expected.config) if data.get(f.name) is not None]
    config = make_config(expected.config, {f.name: _like(f.type, data[f.name], levels) for f in given}, where)
    problems = [
        f"{k} is {data[k]!r}, here it must be {v!r}" if k in data else f"{k} is missing"
        for k, v in to_json(component, config).items()
        if k not in _FREE and not (k in data and _same(data[k], v))
    ]
    if problems:
        raise WeightsError(f"{where} describes a network that is not supported: " + "; ".join(problems))
    return config


def _like(kind: object, value, levels: int):
    """Converts `value` to a field of type `kind`; diffusers allows one number for all levels or one per level."""
    if kind is int or kind is float:
        return value[0] if isinstance(value, list) and value else value
    return tuple(value) if isinstance(value, list) else (value,) * levels


def make_config(kind: type, values: Any, where: str):
    """Builds one of our configs from the fields of a file, after checking their types and sizes.

    Args:
      kind: class of the config.
      values: fields by name, if the file is sound; lists count as tuples.
      where: the file's name, for error messages.
    Returns:
      An instance of `kind`, with its defaults in place of absent fields.
    Raises:
      WeightsError: if a field is unknown, of another type, beyond all sizes in use, or contradicts another one.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where}: {values!r} is no {kind.__name__}")
    types = {f.name: f.type for f in fields(kind)}
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise WeightsError(f"{where}: {kind.__name__} has no {', '.join(unknown)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    problems = [f"{k} is {v!r}, which is not {need}" for k, v in values.items() if (need := _need(k, types[k], v))]
    if problems:
        raise WeightsError(f"{where}: " + "; ".join(problems))
    try:
        config = kind(**values)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error
    if isinstance(config, CLIPConfig) and config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        raise WeightsError(f"{where}: {config.hidden_size} channels must divide by {heads} heads")
    return config


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether `value` is an int or float, and neither NaN nor absurdly large."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _need(field: str, kind: object, value) -> str | None:
    """Returns what a value of `field` must be; None if `value` is."""
    least, most = int(field not in _MAYBE_NONE), _MOST.get(field, _MOST_ELSE)
    whole = f"a whole number from {least} to {most}"

    def fits(number) -> bool:
        return type(number) is int and least <= number <= most

    if kind is int:
        return None if fits(value) else whole
    if kind is float:
        return None if is_number(value) and (value > 0 or field in _ANY_SIGN) else "a finite number above 0"
    if kind is bool or kind is str:
        return None if type(value) is kind else f"of type {kind.__name__}"
    levels = isinstance(value, tuple) and 1 <= len(value) <= _LEVELS and all(map(fits, value))
    return None if levels else f"1 to {_LEVELS} numbers, each {whole}"


def _same(theirs, ours) -> bool:
    if isinstance(theirs, list) and not isinstance(ours, list):
        return all(x == ours for x in theirs)
    if isinstance(ours, list) and not isinstance(theirs, list):
        return all(x == theirs for x in ours)
    return theirs == ours

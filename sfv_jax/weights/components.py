"""The three components of SVD, and conversion of their configs from and to the `config.json` of their libraries."""

from dataclasses import dataclass, fields
from typing import Any

from flax import nnx

from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.weights.folders import WeightsError

DIFFUSERS_VERSION = "0.42.1"  # the version whose files ours equal
# Config fields of ours that diffusers lacks, with the constants that diffusers uses instead.
BUILT_IN = {"norm_groups": 32, "resnet_eps": 1e-6, "mid_eps": 1e-5}


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
    found = data.get("_class_name") or (data.get("architectures") or ["(no class name)"])[0]
    if found != expected.class_name:
        raise WeightsError(f"{where} describes a {found}, expected a {expected.class_name}")
    data = (_CLIP_DEFAULTS if component == "image_encoder" else {}) | data
    levels = len(data.get("block_out_channels", ()))
    known = {f.name: _like(f.type, data[f.name], levels) for f in fields(expected.config) if f.name in data}
    try:
        config = expected.config(**known)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error
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
        return value[0] if isinstance(value, list) else value
    return tuple(value) if isinstance(value, list) else (value,) * levels


def _same(theirs, ours) -> bool:
    if isinstance(theirs, list) and not isinstance(ours, list):
        return all(x == ours for x in theirs)
    if isinstance(ours, list) and not isinstance(theirs, list):
        return all(x == theirs for x in ours)
    return theirs == ours

"""Tensor names of Stability's original single file (`svd.safetensors`, `svd_xt.safetensors`), which ComfyUI also loads.

Rules derive from a config the place and form in such a file of every tensor of a diffusers folder.

    UNet        model.diffusion_model.*
    CLIP        conditioner.embedders.0.open_clip.model.visual.*     open_clip's: q, k and v fused, `proj` transposed
    VAE         first_stage_model.decoder.*                          levels counted from the finest
                conditioner.embedders.3.encoder.{encoder,quant_conv}.*      encoder of the conditioning image
    copy        first_stage_model.encoder.*                          a copy of the encoder, without a quant_conv

Like diffusers, we take the encoder from the conditioner. The autoencoder of the first stage has no `quant_conv`: its
last convolution must output the moments by itself, so we write the product of the two there; a file that has only
that copy is read with an identity as `quant_conv`.

ComfyUI's nodes write files of some of these networks too. Their UNet and VAE have these names, with or without the
prefix; CLIP has the names of transformers below its prefix; `canonical` finds the prefixes.

Mixing factors are the same numbers in both formats. The UNet blends `a spatial + (1 - a) temporal` in both code bases;
the decoder blends `a temporal + (1 - a) spatial`, which diffusers selects by an option of its blender, not by another
parameter.

Sources: Stability-AI/generative-models (VideoUNet, SpatialVideoTransformer, VideoDecoder, AutoencodingEngine, svd.yaml)
and the conversion script of diffusers. No original file was available.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights.diffusers import manifest
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.writer import Shapes

UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.open_clip.model.visual."
CONDITIONER = "conditioner.embedders.3.encoder."
FIRST_STAGE = "first_stage_model."
SIGMA = "edm_vpred."  # of ComfyUI: the scalars sigma_max and sigma_min

_CLIP_MODEL = "conditioner.embedders.0.open_clip.model."
# Networks without their prefix: a name that shows it, a pattern of its names, and the prefix they need.
_BARE = (
    ("input_blocks.0.0.weight", r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.", UNET),
    ("decoder.mid.block_1.norm1.weight", r"(encoder|decoder|quant_conv|post_quant_conv|loss)\.", FIRST_STAGE),
    ("visual.class_embedding", r"", _CLIP_MODEL),  # open_clip's whole model, with its text side
    ("class_embedding", r"(class_embedding|positional_embedding|proj)$|(conv1|ln_pre|ln_post|transformer)\.", CLIP),
    ("visual_projection.weight", r"(vision_model|visual_projection)\.", CLIP),
)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Returns `{name in a whole file: stored name}` of files that leave out the prefixes of their networks.

    Raises:
      ValueError: if two tensors would have the same name.
    """
    stored = list(names)
    there = set(stored)
    rules = [(re.compile(pattern), prefix) for mark, pattern, prefix in _BARE if mark in there]
    found: dict[str, str] = {}
    for name in stored:
        full = next((prefix + name for pattern, prefix in rules if pattern.match(name)), name)
        full = f"model.{name}" if name.startswith("diffusion_model.") else full
        if full in found:
            raise ValueError(f"{found[full]!r} and {name!r} are the same tensor")
        found[full] = name
    if f"{FIRST_STAGE}quant_conv.weight" in found and f"{CONDITIONER}quant_conv.weight" not in found:
        moved = (f"{FIRST_STAGE}encoder.", f"{FIRST_STAGE}quant_conv.")  # the encoder that the conditioner has in SVD
        found = {k.replace(FIRST_STAGE, CONDITIONER) if k.startswith(moved) else k: v for k, v in found.items()}
    return found


@dataclass(frozen=True)
class Place:
    """Place of a diffusers tensor in the single file.

    Attributes:
      name: name of the stored tensor.
      form: "same"; "pointwise", a Linear `[o, i]` stored as a convolution `[o, i, 1, 1]`; or "transposed".
      third: index of the tensor's third of the rows, where the stored tensor is a concatenation of three; else None.
    """

    name: str
    form: str = "same"
    third: int | None = None


def places(
    component: str, config, *, first_stage_encoder: bool = False, transformers: bool = False
) -> dict[str, Place]:
    """Returns the place of every tensor of a diffusers component by the tensor's name.

    Args:
      component: "unet", "vae" or "image_encoder".
      config: our config.
      first_stage_encoder: place the VAE's encoder in the first stage, which has no `quant_conv`.
      transformers: CLIP has the names of transformers below its prefix, as in ComfyUI's files.
    Raises:
      WeightsError: if the format cannot express the network.
    """
    if component == "vae" and config.layers_per_block != 2:
        raise WeightsError(f"the single file has 2 resnets in the decoder's middle, this VAE {config.layers_per_block}")
    place = {"unet": _unet_place, "vae": _vae_place, "image_encoder": _clip_place}[component]
    if component == "image_encoder" and transformers:
        return {name: Place(CLIP + name) for name in manifest(component, config)}
    found = {name: place(name, config) for name in manifest(component, config)}
    if component == "vae" and first_stage_encoder:
        found = {k: _in_first_stage(v) for k, v in found.items() if not k.startswith("quant_conv.")}
    return found


# UNet

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_TRANSFORMER = {
    "temporal_transformer_blocks": "time_stack",
    "time_pos_embed.linear_1": "time_pos_embed.0",
    "time_pos_embed.linear_2": "time_pos_embed.2",
}


def _unet_place(name: str, config: UNetConfig) -> Place:
    module, leaf = name.rsplit(".", 1)
    if module in _UNET_ENDS:
        return Place(f"{UNET}{_UNET_ENDS[module]}.{leaf}")
    block, kind, n, rest = _parts(r"(.+_blocks?(?:\.\d+)?)\.(\w+)\.(\d+)\.(.+)", name)
    if kind == "resnets":
        rest = _resnet_leaf(rest)
    elif kind == "attentions":
        for old, new in _TRANSFORMER.items():
            rest = re.sub(rf"^{re.escape(old)}\.", f"{new}.", rest)
    elif kind == "downsamplers":
        rest = rest.replace("conv.", "op.")
    return Place(f"{UNET}{_unet_module(block, kind, int(n), config)}.{rest}")


def _parts(pattern: str, name: str) -> tuple[str, ...]:
    """Returns the groups of `pattern` in `name`, which must match."""
    match = re.fullmatch(pattern, name)
    assert match, name  # `manifest` contains no other names
    return match.groups()


def _unet_module(block: str, kind: str, n: int, config: UNetConfig) -> str:
    """Returns the position in the original's flat lists of blocks.

    A level has one entry per resnet (with its transformer) and, in the down path, one for its sampler.
    """
    if block == "mid_block":
        return f"middle_block.{2 * n if kind == 'resnets' else 1}"
    side, level = block.split(".")
    start = int(level) * (config.layers_per_block + 1)
    if side == "down_blocks":
        n = config.layers_per_block if kind == "downsamplers" else n
        return f"input_blocks.{1 + start + n}.{int(kind == 'attentions')}"
    if kind == "upsamplers":  # shares the entry of the level's last resnet; the first level has no transformers
        return f"output_blocks.{start + config.layers_per_block}.{1 if level == '0' else 2}"
    return f"output_blocks.{start + n}.{int(kind == 'attentions')}"


def _resnet_leaf(rest: str) -> str:
    part, *names = rest.split(".")
    if part == "time_mixer":
        return rest
    stack = "time_stack." if part == "temporal_res_block" else ""
    return f"{stack}{_RESNET[names[0]]}.{names[1]}"


# VAE

_MID_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_place(name: str, config: VAEConfig) -> Place:
    if name.startswith("quant_conv."):
        return Place(CONDITIONER + name)
    side, rest = name.split(".", 1)
    prefix = f"{CONDITIONER if side == 'encoder' else FIRST_STAGE}{side}."
    rest = re.sub(r"^conv_norm_out\.", "norm_out.", rest)
    rest = re.sub(r"^time_conv_out\.", "conv_out.time_mix_conv.", rest)
    attention = re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", rest)
    if attention:
        form = "pointwise" if attention[2] == "weight" and attention[1] != "group_norm" else "same"
        return Place(f"{prefix}mid.attn_1.{_MID_ATTENTION[attention[1]]}.{attention[2]}", form)
    match = re.fullmatch(r"(mid_block|\w+_blocks\.\d+)\.(\w+)\.(\d+)\.(.+)", rest)
    if match:
        rest = _vae_module(match[1], match[2], int(match[3]), config) + "." + _vae_leaf(match[4])
    return Place(prefix + rest)


def _vae_module(block: str, kind: str, n: int, config: VAEConfig) -> str:
    if block == "mid_block":
        return f"mid.block_{n + 1}"
    side, level = block.split(".")
    if side == "up_blocks":
        level = len(config.block_out_channels) - 1 - int(level)
    side = side.removesuffix("_blocks")
    return f"{side}.{level}.{f'block.{n}' if kind == 'resnets' else f'{side}sample'}"


def _vae_leaf(rest: str) -> str:
    if rest.startswith("temporal_res_block.") or rest == "time_mixer.mix_factor":
        return _resnet_leaf(rest).removeprefix("time_mixer.")
    return rest.removeprefix("spatial_res_block.").replace("conv_shortcut", "nin_shortcut")


def _in_first_stage(place: Place) -> Place:
    return Place(place.name.replace(CONDITIONER, FIRST_STAGE), place.form)


# CLIP

_CLIP_ENDS = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
}
_CLIP_MODULES = {
    "vision_model.pre_layrnorm": "ln_pre",
    "vision_model.post_layernorm": "ln_post",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _clip_place(name: str, config) -> Place:
    if name == "visual_projection.weight":
        return Place(f"{CLIP}proj", "transposed")
    if name in _CLIP_ENDS:
        return Place(CLIP + _CLIP_ENDS[name])
    module, leaf = name.rsplit(".", 1)
    if module in _CLIP_MODULES:
        return Place(f"{CLIP}{_CLIP_MODULES[module]}.{leaf}")
    layer, module = _parts(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", module)
    block = f"{CLIP}transformer.resblocks.{layer}"
    if module in _CLIP_MODULES:
        return Place(f"{block}.{_CLIP_MODULES[module]}.{leaf}")
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(module)
    return Place(f"{block}.attn.in_proj_{leaf}", third=third)


# Tensors

Read = Callable[[str], np.ndarray]


def to_diffusers(place: Place, read: Read) -> np.ndarray:
    """Converts the stored tensor at `place` to the layout of diffusers; `read(name)` returns a stored tensor."""
    value = read(place.name)
    if place.third is not None:
        value = np.split(value, 3)[place.third]
    if place.form == "pointwise":
        return value.reshape(value.shape[:2])
    return value.T if place.form == "transposed" else value


def shapes_there(component: str, config, where: dict[str, Place]) -> Shapes:
    """Returns `{name: shape}` of the stored tensors that `where` covers, in the order of `manifest`."""
    found: Shapes = {}
    for name, shape in manifest(component, config).items():
        if name not in where:
            continue
        place = where[name]
        if place.third is not None:
            shape = (3 * shape[0], *shape[1:])
        elif place.form == "pointwise":
            shape = (*shape, 1, 1)
        elif place.form == "transposed":
            shape = shape[::-1]
        found[place.name] = shape
    return found


def from_diffusers(where: dict[str, Place], read: Read) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, tensor)` to store, in the order of `shapes_there`; `read(name)` returns a tensor of diffusers."""
    sources: dict[str, list[tuple[str, Place]]] = {}
    for name, place in where.items():
        sources.setdefault(place.name, []).append((name, place))
    for name, parts in sources.items():
        values = [read(source) for source, _ in sorted(parts, key=lambda part: part[1].third or 0)]
        form = parts[0][1].form
        if len(values) > 1:
            yield name, np.concatenate(values)
        elif form == "pointwise":
            yield name, values[0][:, :, None, None]
        else:
            yield name, values[0].T if form == "transposed" else values[0]

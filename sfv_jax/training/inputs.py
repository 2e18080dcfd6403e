"""Inputs of a training run: the base model and the data."""

import math
from dataclasses import replace
from functools import partial

import jax
from ml_collections import ConfigDict

from sfv_jax import config as configs
from sfv_jax.checkpoints.base import Base, load_generator, read_unet
from sfv_jax.checkpoints.model_folder import ModelFolder, encoders_identity, load_codec, read_model
from sfv_jax.config import ConfigError
from sfv_jax.data.loader import LatentSource, WorldSource, encoders_of, latent_source, world_source
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.networks import Networks, Params, compute_dtype
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.device import memory_per_device
from sfv_jax.runtime.sharding import param_shardings, spread

FEW = 2**24  # parameters of a UNet that any device holds


def load_base(config: ConfigDict, mesh: jax.sharding.Mesh) -> Base:
    """Loads `config.init`, or initializes a UNet for the procedural world; parameters are placed on `mesh`.

    Raises:
      ConfigError: if `config.unet` would change the parameters of `config.init`, `config.init` is missing, or the UNet
        is too large.
    """
    if not config.init:
        unet, model = configs.unet_of(config), None
        codec = configs.patch_codec_of(config)
        if config.encoders:
            model = read_model(config.encoders)
            codec = load_codec(model)
        elif config.data.source != "world":
            raise ConfigError(
                "config.init is empty: name a model folder (python -m sfv_jax.convert makes one); "
                "or name one with VAE and CLIP tower in config.encoders, to train a UNet from the start"
            )
        networks = Networks(unet)
        place = param_shardings(mesh, networks.abstract["generator"])
        check_memory("the UNet of config.unet", networks.abstract["generator"], place)
        params = first_params(networks, config.seed, place, mesh.size)
        return Base(unet, params, codec, model, None)
    raw = config.init_weights == "generator"
    base = load_generator(config.init, raw=raw, place=lambda abstract: param_shardings(mesh, abstract))
    return replace(base, unet=configs.same_unet(base.unet, config))


def first_params(networks: Networks, seed: int, place, devices: int) -> Params:
    """Returns fresh parameters of the UNet, fp32, on `devices` devices.

    One program that makes them takes longer to compile than they take to make, so small networks are made whole in
    every process.

    Args:
      networks: networks of the method or of the base model.
      seed: seed of the parameters.
      place: tree of their shardings.
      devices: number of devices of the shardings.
    """
    if devices > 1 and tree.count(networks.abstract["generator"]) > FEW:
        return jax.jit(networks.init_generator, static_argnums=0, out_shardings=place)(seed)
    params = networks.init_generator(seed)
    return params if devices == 1 else spread(params, place)


def check_backbone(config: ConfigDict, unet: UNetConfig) -> None:
    """Checks that `config.backbone_init`, if it is given, has the parameters of the generator's UNet.

    Raises:
      ConfigError: if it has others.
      WeightsError: if it is neither a model folder nor a run.
    """
    if not config.get("backbone_init"):
        return
    theirs = read_unet(config.backbone_init)
    kept = {name: getattr(unet, name) for name in configs.SAME_PARAMETERS}
    if replace(theirs, **kept) != unet:
        raise ConfigError(f"config.backbone_init={config.backbone_init} has another UNet than the generator")


def load_backbone(config: ConfigDict, networks: Networks, shardings, mesh: jax.sharding.Mesh) -> Params:
    """Loads the discriminator's backbone from `config.backbone_init`, in the compute dtype, placed by `shardings`."""
    place = partial(param_shardings, mesh)
    base = load_generator(config.backbone_init, place=place, dtype=compute_dtype(config.dtype))
    return jax.jit(networks.backbone_params, out_shardings=shardings)(base.params)


def check_memory(what: str, abstract, shardings) -> None:
    """Checks, before any array is made, that those of a tree fit the memory of a device, where this is reported.

    Args:
      what: the tree's name in the message.
      abstract: shapes and dtypes.
      shardings: their shardings.

    Raises:
      ConfigError: if they do not.
    """
    arrays, places = jax.tree.leaves(abstract), jax.tree.leaves(shardings)
    pairs = zip(arrays, places, strict=True)
    need = sum(math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize for x, place in pairs)
    limit = memory_per_device()
    if limit is not None and need > limit:
        raise ConfigError(
            f"config: {what} has {sum(x.size for x in arrays):,} numbers and takes {need / 2**30:.1f} GiB of each "
            f"device, which has {limit / 2**30:.1f}: train smaller networks, or raise mesh.fsdp"
        )


def open_source(config: ConfigDict, base: Base, split: str) -> LatentSource | WorldSource:
    """Opens the examples of `config.data` for random access.

    Raises:
      ConfigError: if latents and UNet do not fit.
    """
    data, source = config.data, open_examples(config, base.codec, base.model, split)
    example = source[0]
    channels = (example["latents"].shape[-1], example["image_embed"].shape[-1])
    expected = (base.unet.out_channels, base.unet.cross_attention_dim)
    if channels != expected:
        advice = "prepare the cache with that model" if data.source == "latents" else "change config.unet"
        raise ConfigError(
            f"config.data: latents have {channels[0]} channels and image embeddings {channels[1]} numbers, the UNet of "
            f"config.init={config.init!r} takes {expected[0]} and {expected[1]}: {advice}"
        )
    return source


def open_examples(
    config: ConfigDict, codec: SVDCodec | PatchCodec, model: ModelFolder | None, split: str
) -> LatentSource | WorldSource:
    """Opens the examples of `config.data` for random access: latents of the codec, whatever UNet takes them.

    Raises:
      ConfigError: if other encoders than those of `model` made them.
    """
    data = config.data
    if data.source == "world":
        return world_source(configs.world_of(config), split, data.world_size, codec)
    source = latent_source(data.path, split, codec.scaling_factor)
    check_encoders(config, model)
    return source


def check_encoders(config: ConfigDict, model: ModelFolder | None) -> None:
    """Checks that the VAE and CLIP tower that made the cache are those of the base model, which sampling uses.

    Nothing is checked if the identity of either is not recorded, or with `config.data.any_encoders`.

    Raises:
      ConfigError: if the identities differ.
    """
    if model is None or config.data.any_encoders:
        return
    theirs, ours = encoders_of(config.data.path), encoders_identity(model.meta)
    if theirs and ours and theirs != ours:
        raise ConfigError(
            f"config.data.path={config.data.path} was made with other encoders ({theirs[:12]}...) than those of "
            f"{model.path} ({ours[:12]}...): prepare it with that model, or set config.data.any_encoders=True if "
            "they only differ in file format"
        )

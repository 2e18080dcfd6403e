"""What a run trains: its networks, its first parameters, its examples, its description on disk and its pictures.

A method trains a UNet, unless its module names another entry of `SUBJECTS` as `SUBJECT`. A new kind of network needs an
entry here and nothing in the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sfv_jax.checkpoints.base import describe_run, describe_vae, is_run, load_vae, read_run
from sfv_jax.checkpoints.decoders import check_space, describe_decoder_run, read_tiny
from sfv_jax.checkpoints.model_folder import ModelFolder, load_codec, read_model
from sfv_jax.config import ConfigError, vae_of, world_of
from sfv_jax.data.loader import FrameSource, WorldSource
from sfv_jax.errors import UserError
from sfv_jax.methods import METHODS, decoder
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec, SVDCodec, to_signed
from sfv_jax.models.decoders import to_pixels
from sfv_jax.models.networks import Params
from sfv_jax.models.vae import TemporalVAE
from sfv_jax.runtime.processes import whole
from sfv_jax.runtime.sharding import on_mesh, param_shardings
from sfv_jax.training.inputs import check_backbone, load_base, open_examples, open_source
from sfv_jax.training.metrics import MetricWriter
from sfv_jax.training.previews import Previews, stacked, unet_previews
from sfv_jax.training.step import step_flops, unet_step_flops


@dataclass(frozen=True)
class Subject:
    """What the loop needs to know of a run besides its config.

    Attributes:
      networks: result of the method's `make_networks`, for its `init_state` and `make_train_step`.
      params: parameters on the mesh from which `init_state` makes state and frozen parameters.
      source: examples with random access.
      describe: function that writes `network.json` to the workdir.
      previews: function from the workdir and the receiver of metrics to the pictures of the run.
      flops: function that counts the FLOPs of a train step on all devices together.
    """

    networks: Any
    params: Params
    source: Any
    describe: Callable[[Path], None]
    previews: Callable[[Path, MetricWriter], Previews]
    flops: Callable[[], float]


def open_subject(config: ConfigDict, mesh: jax.sharding.Mesh) -> Subject:
    """Returns what `config.method` trains; parameters are placed on `mesh`.

    Raises:
      ConfigError: if the base model, the data and the config do not fit each other.
      WeightsError: if `config.init` is no model that the method can start from.
    """
    return SUBJECTS[getattr(METHODS[config.method], "SUBJECT", "unet")](config, mesh)


def made(config: ConfigDict, base):
    """Returns `make_networks(base, config)` of the method.

    Raises:
      ConfigError: if the recipe is impossible.
    """
    try:
        return METHODS[config.method].make_networks(base, config)
    except UserError as error:
        raise ConfigError(f"config: {error}") from error


def unet_subject(config: ConfigDict, mesh: jax.sharding.Mesh) -> Subject:
    """Returns the UNet of `config.init`, or a new one for the procedural world."""
    base = load_base(config, mesh)
    check_backbone(config, base.unet)
    source = open_source(config, base, config.data.split)
    networks = made(config, base.unet)
    params, base = base.params, replace(base, params={})  # the state replaces them

    def describe(workdir: Path) -> None:
        codec = base.codec if isinstance(base.codec, PatchCodec) else None
        cells = source[0]["latents"].shape[1:3]
        size = (cells[0] * base.codec.downscale, cells[1] * base.codec.downscale)
        describe_run(workdir, base.unet, codec, base.model.path if base.model else None, size)

    def previews(workdir: Path, writer: MetricWriter) -> Previews:
        held_out = open_source(config, base, "heldout") if config.data.source == "world" else source
        return unet_previews(config, base, held_out, workdir, writer, mesh)

    return Subject(networks, params, source, describe, previews, lambda: unet_step_flops(config, base.unet, source[0]))


def vae_subject(config: ConfigDict, mesh: jax.sharding.Mesh) -> Subject:
    """Returns the VAE of `config.init`, or a new one, and frames of the procedural world."""
    if config.data.source != "world":
        raise ConfigError(f"config.data.source={config.data.source}: a VAE is trained on frames: choose world")
    world = world_of(config)
    if config.init:
        vae, params = load_vae(config.init, raw=config.init_weights == "generator")
    else:
        vae = vae_of(config)
        params = tree.init(TemporalVAE, vae, config.seed)
    vae = replace(vae, decode_pixels=0)  # pieces save memory of decoding alone
    if world.size % vae.downscale:
        raise ConfigError(f"config.data.world.size={world.size}: give a multiple of the VAE's {vae.downscale}")
    if config.vae.num_frames > world.num_frames:
        raise ConfigError(f"config.vae.num_frames={config.vae.num_frames}: clips have {world.num_frames} frames")
    source = FrameSource(world, config.data.split, config.data.world_size, config.vae.num_frames)
    networks = made(config, vae)

    def previews(workdir: Path, writer: MetricWriter) -> Previews:
        truth = stacked(FrameSource(world, "heldout", config.sample_count, world.num_frames), config.sample_count)

        def reconstruct(params, frames):
            network = networks.generator(params)
            return to_pixels(network.decode(network.encode(to_signed(frames))))

        run = on_mesh(mesh, jax.jit(reconstruct))
        return Previews(
            truth["frames"], lambda params: whole(run(params, truth["frames"])), workdir, writer, copies=True
        )

    shapes = networks.abstract["generator"]
    return Subject(
        networks,
        jax.device_put(params, param_shardings(mesh, params)),
        source,
        lambda workdir: describe_vae(workdir, vae),
        previews,
        lambda: step_flops(config, networks, shapes, source[0]),
    )


def decoder_subject(config: ConfigDict, mesh: jax.sharding.Mesh) -> Subject:
    """Returns a tiny decoder for the latents of `config.init`, a model folder or a run, whose VAE teaches it."""
    model, codec = _teacher(config)
    if config.decoder.real_weight and config.data.source != "world":
        raise ConfigError("config.decoder.real_weight needs real frames, which latent caches lack: set it to 0")
    open_split = partial(open_examples, config, codec, model)
    base = load_base(config, mesh) if config.decoder.generated_share else None
    if base is not None:
        open_split = partial(open_source, config, base)
    source = open_split(config.data.split)
    if isinstance(source, WorldSource):
        source = replace(source, pixels=bool(config.decoder.real_weight))
    vae = codec.vae_config
    # Reading one example also compiles its encoder once, before the loader's threads would all compile it.
    if (channels := source[0]["latents"].shape[-1]) != vae.latent_channels:
        raise ConfigError(
            f"config.data: latents have {channels} channels, the VAE of config.init={config.init!r} makes "
            f"{vae.latent_channels}: prepare the cache with that model"
        )
    networks = made(config, decoder.Teacher(vae, base.unet if base else None))
    params = {"decoder": _first_decoder(config, networks, model), "teacher": codec.params["vae"]["decoder"]}
    # Copies, from the host: the state takes over what it starts from, the codec keeps its own, and any mesh takes them.
    params = jax.device_put(jax.tree.map(np.array, params), param_shardings(mesh, params))
    params |= {"unet": base.params} if base else {}
    shapes = jax.eval_shape(lambda params: params, params)
    del base

    def previews(workdir: Path, writer: MetricWriter) -> Previews:
        held_out = open_examples(config, codec, model, "heldout") if config.data.source == "world" else source
        latents = stacked(held_out, config.sample_count)["latents"]
        tiny = SVDCodec(vae, codec.clip_config, {}, tiny=networks.config)

        def make(params) -> np.ndarray:
            one = jax.tree.map(whole, {k: v for k, v in params.items() if k != "projectors"})
            return np.asarray(tiny.with_params({"tiny_decoder": one}).decode(latents))

        return Previews(np.asarray(codec.decode(latents)), make, workdir, writer, copies=True)

    return Subject(
        networks,
        params,
        source,
        lambda workdir: describe_decoder_run(workdir, networks.config, model),
        previews,
        lambda: step_flops(config, networks, shapes, source[0]),
    )


def _teacher(config: ConfigDict) -> tuple[ModelFolder, SVDCodec]:
    """Returns the model folder of `config.init`, or of the run there, and its codec.

    Raises:
      ConfigError: if it has no VAE.
    """
    if not config.init:
        raise ConfigError("config.init is empty: name a model folder or a run, whose VAE is to be distilled")
    folder = read_run(Path(config.init))[2] if is_run(config.init) else config.init
    model = read_model(folder) if folder else None
    codec = load_codec(model) if model else None
    if model is None or not isinstance(codec, SVDCodec):
        raise ConfigError(f"config.init={config.init} has the patch codec: there is no VAE to distill")
    return model, codec


def _first_decoder(config: ConfigDict, networks: decoder.DecoderNetworks, model: ModelFolder) -> Params:
    """Returns the parameters of `config.decoder.init`, or random ones.

    Raises:
      ConfigError: if it has other sizes than the decoder that is to be trained.
      WeightsError: if it is no tiny decoder of this latent space.
    """
    if not config.decoder.init:
        return decoder.fresh(networks, config)
    found = read_tiny(Path(config.decoder.init))
    check_space(found, model)
    if found.config != networks.config:
        raise ConfigError(
            f"config.decoder.init={config.decoder.init} has other sizes ({found.config}) than config.decoder describes "
            f"({networks.config}): set config.decoder.variant, block_out_channels and layers_per_block"
        )
    return jax.tree.map(jnp.asarray, found.params)


SUBJECTS: dict[str, Callable[[ConfigDict, jax.sharding.Mesh], Subject]] = {
    "unet": unet_subject,
    "vae": vae_subject,
    "decoder": decoder_subject,
}

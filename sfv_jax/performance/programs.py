"""Programs of training, sampling and preparing, with the shapes of their arguments; nothing is loaded.

The train step is built by `training.step`, as in training itself, so a plan compiles the program that training runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Wrapped

from sfv_jax import config as configs
from sfv_jax.checkpoints.base import is_run, read_run
from sfv_jax.checkpoints.decoders import own_decoder, read_tiny
from sfv_jax.checkpoints.model_folder import read_model
from sfv_jax.config import ConfigDict, ConfigError
from sfv_jax.config_check import check
from sfv_jax.errors import UserError
from sfv_jax.methods import METHODS, decoder
from sfv_jax.models import tree
from sfv_jax.models.clip import CLIPConfig, CLIPVision
from sfv_jax.models.codec import PatchCodec, SVDCodec
from sfv_jax.models.networks import DTYPES, Networks
from sfv_jax.models.tiny_decoder import VARIANTS, TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.runtime.sharding import batch_sharding, local_rows, param_shardings, replicated_sharding, with_shardings
from sfv_jax.sampling.generator import Generator
from sfv_jax.training.step import jit_train_step


@dataclass(frozen=True)
class Program:
    """Jitted function and its abstract arguments with their shardings.

    Attributes:
      parts: the arguments by content ("parameters", "optimizer", ...), for the account of memory.
      plain: the same function without fused attention, for counting FLOPs on its jaxpr; called with `args`.
      resident: arrays that stay in memory beside the arguments while the program runs.
      donates: whether the first result replaces the first argument, as in a train step.
    """

    name: str
    function: Wrapped
    args: tuple
    parts: dict[str, Any]
    plain: Callable
    resident: dict[str, Any] = field(default_factory=dict)
    donates: bool = False


@dataclass(frozen=True)
class SampleOptions:
    """Options of sampling that determine its programs, as in `Sampler.load` and `Sampler.__call__`.

    Attributes:
      memory: bytes of the device, for a device that is absent; None to ask the present one.
      tiny: the tiny decoder in place of the VAE's; None for the VAE's.
    """

    steps: int = 1
    guidance: tuple[float, float] | None = None
    dtype: str = "bfloat16"
    vae_dtype: str = "bfloat16"
    decode_chunk_size: int | None = None
    decode_pixels: int | None = None
    memory: float | None = None
    tiny: TinyDecoderConfig | None = None


@dataclass(frozen=True)
class Sizes:
    """Configs of the networks of a base model; `vae` and `clip` are None if `patch` replaces them."""

    unet: UNetConfig
    vae: VAEConfig | None
    clip: CLIPConfig | None
    patch: PatchCodec | None = None

    @property
    def downscale(self) -> int:
        """Pixels per latent cell in each direction."""
        return self.encoders[0].downscale if self.patch is None else self.patch.downscale

    @property
    def encoders(self) -> tuple[VAEConfig, CLIPConfig]:
        """Configs of VAE and CLIP tower, which must be there."""
        assert self.vae is not None and self.clip is not None, "a model with the patch codec has no VAE"
        return self.vae, self.clip


def sizes_of(config: ConfigDict) -> Sizes:
    """Returns the networks that `config` trains: those of `config.init`, or SVD's with `config.unet`.

    Raises:
      ConfigError, WeightsError: if training would reject this base model.
    """
    if not config.init:
        world = config.data.source == "world"
        patch = configs.patch_codec_of(config) if world else None
        return Sizes(configs.unet_of(config), *((None, None) if world else (VAEConfig.svd(), CLIPConfig.svd())), patch)
    unet, patch, model = read_run(Path(config.init)) if is_run(config.init) else (None, None, Path(config.init))
    opened = read_model(model) if model else None
    found = opened.configs if opened else {}
    if unet is None and config.method == decoder.SUBJECT and "unet" not in found:
        unet = configs.unet_of(config)  # a VAE alone can teach; only the length of a clip is taken from this
    if unet is None and opened is not None:
        unet = opened.config("unet")
    assert unet is not None, "a run has a UNet"
    unet, patch = configs.same_unet(unet, config), patch or found.get("codec")
    return Sizes(unet, None if patch else found["vae"], None if patch else found["image_encoder"], patch)


def tiny_of(name: str, config: ConfigDict, sizes: Sizes) -> TinyDecoderConfig | None:
    """Returns the sizes of the decoder that `--decoder` names; None for the VAE's own.

    Args:
      name: "full"; "tiny" for that of the model of `config.init`, or TAESDV's layout if there is none; "wide"; else
        the file, folder, run or name of a tiny decoder.
      config: config of the job.
      sizes: the networks of `config`.

    Raises:
      ConfigError: if there is no VAE whose latents it could decode.
      WeightsError: if there is no such decoder.
    """
    if name == "full":
        return None
    if sizes.patch is not None:
        raise ConfigError(f"decoder {name!r}: the patch codec has no decoder network; give config.init")
    vae, _ = sizes.encoders
    model = (read_run(Path(config.init))[2] if is_run(config.init) else Path(config.init)) if config.init else None
    if name == "tiny" and model and (own := own_decoder(read_model(model))):
        return read_tiny(own).config
    if name in VARIANTS:
        return VARIANTS[name](vae.latent_channels, vae.downscale)
    return read_tiny(Path(name)).config


def shapes(mesh: Mesh, **arrays) -> dict:
    """Returns abstract arrays of a batch on `mesh` by name, replicated if the batch does not divide over the mesh.

    Args:
      mesh: devices of the program.
      **arrays: (shape, dtype) of each array.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    split, whole = batch_sharding(mesh), replicated_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=whole if shape[0] % shares else split)
        for name, (shape, dtype) in arrays.items()
    }


def train_program(config: ConfigDict, mesh: Mesh, sizes: Sizes, size: tuple[int, int]) -> Program:
    """Returns the train step of `config` on videos of `size (height, width)` pixels.

    Raises:
      ConfigError: if training would reject `config` before it reads data.
    """
    check(config)
    method = METHODS[config.method]
    subject = getattr(method, "SUBJECT", "unet")
    if subject not in ("unet", decoder.SUBJECT):
        raise ConfigError(f"config.method={config.method!r}: only trainings of UNets and tiny decoders are planned")
    if subject == decoder.SUBJECT and sizes.patch is not None:
        raise ConfigError(f"config.init={config.init!r} has the patch codec: there is no VAE to distill")
    try:
        local_rows(mesh, config.batch_size, config.accumulation_steps)
        networks, start = _trained(config, sizes, sizes.unet)
        counted, _ = _trained(config, sizes, configs.plain_unet(sizes.unet))
    except UserError as error:
        raise ConfigError(f"config: {error}") from error
    abstract = jax.eval_shape(lambda params: method.init_state(networks, config, params), start)
    shardings = param_shardings(mesh, abstract)
    state, frozen = with_shardings(abstract, shardings)
    (h, w), n, unet = (side // sizes.downscale for side in size), config.batch_size, sizes.unet
    frames = configs.world_of(config).num_frames if config.data.source == "world" else unet.num_frames
    seen = subject == decoder.SUBJECT and config.decoder.real_weight
    real = {"frames": ((n, frames, *size, 3), jnp.uint8)} if seen else {}
    batch = shapes(
        mesh,
        **real,
        latents=((n, frames, h, w, unet.out_channels), jnp.float32),
        cond_latent=((n, h, w, unet.in_channels - unet.out_channels), jnp.float32),
        image_embed=((n, unet.cross_attention_dim), jnp.float32),
        ids=((n, 3), jnp.float32),
    )
    optimizer = {name: state[name] for name in state if name.startswith("opt_")}
    parts = {"parameters": {k: v for k, v in state.items() if k != "ema" and k not in optimizer}}
    parts |= {"optimizer": optimizer, "EMA": state["ema"], "frozen": frozen, "batch": batch}
    step: Any = jit_train_step(method, networks, config, mesh, shardings)
    return Program(
        "train step",
        step,
        (state, frozen, batch),
        parts,
        method.make_train_step(counted, config),
        donates=True,
    )


def _trained(config: ConfigDict, sizes: Sizes, unet: UNetConfig) -> tuple[Any, Any]:
    """Returns the networks of `config.method`, and the shapes of the parameters that its `init_state` starts from.

    Raises:
      UserError: if training would reject the recipe.
    """
    method = METHODS[config.method]
    if config.method != decoder.SUBJECT:
        networks = method.make_networks(unet, config)
        return networks, networks.abstract["generator"]
    generates = bool(config.decoder.generated_share)
    networks = method.make_networks(decoder.Teacher(sizes.encoders[0], unet if generates else None), config)
    start = {name: networks.abstract[name] for name in ("decoder", "teacher")}
    return networks, start | ({"unet": Networks(unet).abstract["generator"]} if generates else {})


def sample_programs(
    mesh: Mesh, sizes: Sizes, size: tuple[int, int], batch: int, options: SampleOptions | None = None
) -> list[Program]:
    """Returns the programs that `Sampler.__call__` runs one after another: clip, encode, denoise, decode.

    The weights of all three networks stay in memory.

    Args:
      mesh: devices of the programs.
      sizes: configs of the networks.
      size: (height, width) of the videos in pixels.
      batch: videos per call.
      options: options of sampling; None for the defaults.
    """
    options = options or SampleOptions()
    unet, frames, (height, width) = sizes.unet, sizes.unet.num_frames, size
    weights = _sampling_weights(mesh, sizes, options)
    codec = sizes.patch or SVDCodec(
        *sizes.encoders,
        {},
        decode_dtype=DTYPES[options.vae_dtype],
        pixels=options.decode_pixels,
        memory=options.memory,
        tiny=options.tiny,
    )
    # Built here, not during tracing: it takes seconds.
    generators = {config: Generator(config, options.dtype) for config in (unet, configs.plain_unet(unet))}

    def with_weights(weights) -> SVDCodec | PatchCodec:
        return codec.with_params(weights) if isinstance(codec, SVDCodec) else codec

    def embed(weights, images):
        return with_weights(weights).embed(images)

    def encode(weights, images, noise):
        return with_weights(weights).encode_image(images, noise, 0.02)

    def denoise(weights, noise, condition, unet=unet):
        run = generators[unet]
        return run(weights["unet"], condition, noise, steps=options.steps, guidance=options.guidance)

    def decode(weights, latents):
        return with_weights(weights).decode_checked(latents, options.decode_chunk_size)

    h, w = height // sizes.downscale, width // sizes.downscale
    f32, channels = jnp.float32, unet.out_channels
    images = shapes(mesh, images=((batch, height, width, 3), jnp.uint8), noise=((batch, height, width, 3), f32))
    latents = shapes(mesh, latents=((batch, frames, h, w, channels), f32))["latents"]
    given = shapes(
        mesh,
        cond_latent=((batch, h, w, unet.in_channels - channels), f32),
        image_embed=((batch, unet.cross_attention_dim), f32),
        ids=((batch, 3), f32),
    )
    plain = lambda weights, noise, condition: denoise(weights, noise, condition, configs.plain_unet(unet))  # noqa: E731
    return [
        _stage("clip", embed, weights, ("image_encoder",), (images["images"],)),
        _stage("encode", encode, weights, ("vae",), tuple(images.values())),
        _stage("denoise", denoise, weights, ("unet",), (latents, given), plain),
        _stage("decode", decode, weights, ("tiny_decoder" if options.tiny else "vae",), (latents,)),
    ]


def _stage(
    name: str, function: Callable, weights: dict, used: tuple[str, ...], inputs: tuple, plain: Callable | None = None
) -> Program:
    """Returns the program of a stage that uses the weights named in `used`; the others are resident."""
    mine = {k: v for k, v in weights.items() if k in used}
    others = {"other weights": {k: v for k, v in weights.items() if k not in used}}
    args = (mine, *inputs)
    return Program(name, jax.jit(function), args, {"parameters": mine, "batch": inputs}, plain or function, others)


def _sampling_weights(mesh: Mesh, sizes: Sizes, options: SampleOptions) -> dict:
    """Returns abstract weights, sharded as by `Sampler.load`: the UNet in its `dtype`, all others in fp32."""
    weights = {"unet": Networks(sizes.unet).abstract["generator"]}
    weights["unet"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPES[options.dtype]), weights["unet"])
    if sizes.patch is None:
        weights |= _encoder_weights(sizes)
    if options.tiny:
        weights["tiny_decoder"] = tree.abstract(TinyTemporalDecoder, options.tiny)[1]
    return with_shardings(weights, param_shardings(mesh, weights))


def _encoder_weights(sizes: Sizes) -> dict:
    vae, clip = sizes.encoders
    return {"vae": tree.abstract(TemporalVAE, vae)[1], "image_encoder": tree.abstract(CLIPVision, clip)[1]}


def prepare_programs(mesh: Mesh, sizes: Sizes, size: tuple[int, int], batch: int) -> list[Program]:
    """Returns the programs of `preparation.make_encoder` for `batch` clips: conditions, then latents of all frames.

    Args:
      mesh: devices of the programs.
      sizes: configs of the networks.
      size: (height, width) of the clips in pixels.
      batch: clips per call.

    Raises:
      ConfigError: if the base model has no VAE.
    """
    if sizes.patch is not None:
        raise ConfigError("config.data.source='world' needs no preparation: there is nothing to plan")
    weights = _encoder_weights(sizes)
    weights = with_shardings(weights, param_shardings(mesh, weights))
    shape = (batch, sizes.unet.num_frames, *size, 3)

    codec = SVDCodec(*sizes.encoders, {})

    def condition(weights, images, noise):
        return codec.with_params(weights).condition(images, None, 0.02, noise)

    def encode(weights, frames):
        return codec.with_params(weights).encode(frames)

    first = (batch, *size, 3)
    inputs = shapes(mesh, images=(first, jnp.uint8), noise=(first, jnp.float32))
    frames = shapes(mesh, frames=(shape, jnp.uint8))["frames"]
    return [
        _stage("condition", condition, weights, ("vae", "image_encoder"), tuple(inputs.values())),
        _stage("encode", encode, weights, ("vae",), (frames,)),
    ]

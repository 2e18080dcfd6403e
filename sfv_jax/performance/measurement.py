"""Measurements of the programs of sampling and training on the present device."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from sfv_jax import config as configs
from sfv_jax.diffusion import edm
from sfv_jax.errors import UserError
from sfv_jax.methods import sfv
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.tiny_decoder import VARIANTS, TinyDecoderConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import random_arrays, timing
from sfv_jax.performance.programs import Program, SampleOptions, Sizes, sample_programs, train_program
from sfv_jax.performance.timing import Timing
from sfv_jax.runtime.device import count_flops, peak_flops, peak_memory
from sfv_jax.runtime.sharding import make_mesh, on_mesh

BUSY = (
    "More than 100 % of the limit: the machine was busy while it was measured, or became idle since. Repeat on an idle "
    "machine."
)


def scaled(*channels: int) -> Sizes:
    """Returns SVD's networks with a UNet of these `channels`, a VAE of half as many and a tiny CLIP tower."""
    heads = tuple(c // 64 for c in channels)
    unet = UNetConfig(
        block_out_channels=channels, num_attention_heads=heads, cross_attention_dim=64, addition_time_embed_dim=64
    )
    vae = VAEConfig(block_out_channels=tuple(c // 2 for c in channels))
    return Sizes(unet, vae, CLIPConfig.tiny(projection_dim=64))


NETWORKS = {
    "svd": Sizes(UNetConfig.svd(), VAEConfig.svd(), CLIPConfig.svd()),
    "mid": scaled(128, 256, 512, 512),
    "small": scaled(64, 128, 256, 256),
    "tiny": Sizes(UNetConfig.tiny(), VAEConfig.tiny(), CLIPConfig.tiny(projection_dim=32)),
}


@dataclass(frozen=True)
class Request:
    """Settings of a measurement, the flags of the command `benchmark`.

    Attributes:
      networks: a key of `NETWORKS`.
      height, width: of the video in pixels.
      num_frames: frames of the video; None for the number that the networks were trained with.
      batch_size: videos per call.
      dtype: compute dtype, also of the VAE's decoder.
      repeats: timed warm calls.
      train: measures the SF-V step instead of sampling.
      remat: recomputes activations in the backward pass of `train`.
      compare: "diffusers" to time that package in turns with this one, on the same weights; "decoders" to time the
        VAE's decoder in turns with the tiny one; None to time the programs alone.
      decoder: "full" for the VAE's, else a key of `VARIANTS`, the sizes of a tiny decoder, as `compare` needs.
    """

    networks: str = "svd"
    height: int = 576
    width: int = 1024
    num_frames: int | None = None
    batch_size: int = 1
    dtype: str = "bfloat16"
    repeats: int = 10
    train: bool = False
    remat: bool = False
    compare: str | None = None
    decoder: str = "full"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video in pixels."""
        return self.height, self.width

    def sizes(self) -> Sizes:
        """Returns the configs of the networks, adapted to the request.

        Raises:
          UserError: if height or width is no multiple of the downscaling.
        """
        sizes = NETWORKS[self.networks]
        changes: dict[str, Any] = {"num_frames": self.num_frames} if self.num_frames else {}
        sizes = replace(sizes, unet=replace(sizes.unet, remat=self.remat and self.train, **changes))
        if any(side < sizes.downscale or side % sizes.downscale for side in self.size):
            raise UserError(f"--height {self.height} --width {self.width}: both must be multiples of {sizes.downscale}")
        return sizes


@dataclass(frozen=True)
class Row:
    """Measurement of one program.

    Attributes:
      timing: of its calls.
      flops: matrix products and convolutions of a call, counted on the jaxpr; attention as its two products.
      compile_seconds: time of tracing and compilation.
      temporary_bytes: temporary memory of the compiled program per device, as XLA reports it.
    """

    name: str
    timing: Timing
    flops: float = 0.0
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


@dataclass(frozen=True)
class Built:
    """Compiled program.

    Attributes:
      compiled: the program.
      seconds: time of tracing and compilation.
      flops: as in `Row`.
    """

    compiled: Compiled
    seconds: float
    flops: float


def build(program: Program, mesh: Mesh) -> Built:
    """Traces and compiles `program` and counts its FLOPs."""
    began = time.perf_counter()
    compiled = on_mesh(mesh, program.function.lower)(*program.args).compile()
    return Built(compiled, time.perf_counter() - began, count_flops(program.plain, *program.args))


def measure(program: Program, args: tuple, built: Built, repeats: int) -> Row:
    """Times a compiled `program` on the arrays `args`.

    If the program donates its first argument, the next call gets the first result in its place, as in training.
    """
    held = list(args)

    def call():
        out = built.compiled(*held)
        if program.donates:
            held[0], out = out
        return out

    timed = timing.warm(call, repeats)
    memory = built.compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    return Row(program.name, timed, built.flops, built.seconds, temporary)


def sampling(
    mesh: Mesh,
    sizes: Sizes,
    size: tuple[int, int],
    batch: int,
    options: SampleOptions,
    repeats: int,
    order: Sequence[str] = ("clip", "encode", "denoise", "decode"),
    build: Callable[[Program, Mesh], Built] = build,
) -> Iterator[tuple[Row, Program | None, Compiled | None]]:
    """Measures each stage of a one-step video, then all of them one after another up to frames in host memory.

    Args:
      mesh: one device.
      sizes: configs of the networks.
      size: (height, width) of the videos in pixels.
      batch: videos per call.
      options: of sampling; one step.
      repeats: timed warm calls.
      order: the stages in the order of their measurement.
      build: called with each program and the mesh, to compile it.

    Yields:
      The measurement of each program, the program and its compiled form; at last, with None for both, that of the
      whole, "image to frames".
    """
    programs = {program.name: program for program in sample_programs(mesh, sizes, size, batch, options)}
    weights: dict[str, Any] = {}
    inputs: dict[str, tuple] = {}
    compiled: dict[str, Compiled] = {}
    rows: list[Row] = []

    def run(name: str, *given):
        return compiled[name]({part: weights[part] for part in programs[name].args[0]}, *given)

    def whole() -> np.ndarray:
        noise, condition = inputs["denoise"]
        made = {"image_embed": run("clip", inputs["clip"][0]), "cond_latent": run("encode", *inputs["encode"])}
        frames, _ = run("decode", run("denoise", noise, condition | made))
        return jax.device_get(frames)

    for name in order:
        held, *given = programs[name].args
        weights |= {part: random_arrays.random_arrays(held[part]) for part in held if part not in weights}
        inputs[name] = random_arrays.random_arrays(tuple(given))
        arguments = ({part: weights[part] for part in held}, *inputs[name])
        built = build(programs[name], mesh)
        compiled[name] = built.compiled
        rows.append(measure(programs[name], arguments, built, repeats))
        yield rows[-1], programs[name], built.compiled
    total = timing.warm(whole, repeats)
    yield Row("image to frames", total, sum(row.flops for row in rows)), None, None


def decoding(mesh: Mesh, sizes: Sizes, request: Request) -> Iterator[Row]:
    """Measures the VAE's decoder and a tiny one in turns, on random weights and the same latents."""
    built, calls = {}, {}
    for name in ("full", request.decoder):
        options = SampleOptions(dtype=request.dtype, vae_dtype=request.dtype, tiny=tiny_sizes(sizes, name))
        program = sample_programs(mesh, sizes, request.size, request.batch_size, options)[-1]
        built[name], arguments = build(program, mesh), random_arrays.random_arrays(program.args)
        calls[name] = lambda compiled=built[name].compiled, arguments=arguments: compiled(*arguments)
    for name, timed in timing.alternate(calls, request.repeats).items():
        memory = built[name].compiled.memory_analysis()
        temporary = memory.temp_size_in_bytes if memory else None
        yield Row(f"decode, {name}", timed, built[name].flops, built[name].seconds, temporary)


def tiny_sizes(sizes: Sizes, name: str) -> TinyDecoderConfig | None:
    """Returns the tiny decoder `name` for the VAE of `sizes`; None for "full"."""
    vae, _ = sizes.encoders
    return None if name == "full" else VARIANTS[name](vae.latent_channels, vae.downscale)


def training(
    config: configs.ConfigDict, mesh: Mesh, sizes: Sizes, size: tuple[int, int], repeats: int
) -> Iterator[Row]:
    """Measures the SF-V step and programs of growing parts of it, each compiled alone.

    `split` computes the parts that are no programs themselves as differences of medians. XLA may fuse these parts
    differently in the whole step.

    Args:
      config: of SF-V.
      mesh: one device.
      sizes: configs of the networks.
      size: (height, width) of the videos in pixels.
      repeats: timed warm calls.

    Yields:
      Rows in the order that `split` takes: generator forward; forward and backward; gradients of both networks without
      R1; with R1; the whole step.
    """
    program = train_program(config, mesh, sizes, size)
    state, frozen, batch = random_arrays.random_arrays(program.args)
    generator, heads = state["generator"], state["heads"]
    networks = sfv.make_networks(sizes.unet, config)

    def forward(generator, batch):
        sigma = jnp.full(len(batch["latents"]), edm.SIGMA_MAX)
        return edm.denoise(networks.generator(generator), edm.SIGMA_MAX * batch["latents"], sigma, batch)

    def both(generator, batch):
        return jax.grad(lambda g: jnp.mean(jnp.square(forward(g, batch))))(generator)

    def gradients(r1_weight: float) -> Callable:
        changed = config.copy_and_resolve_references()
        changed.sfv.r1_weight = r1_weight
        made = sfv.make_gradients(networks, changed)
        return lambda generator, heads, frozen, batch: made(generator, heads, frozen, batch, jax.random.key(0), 0)

    everything = (generator, heads, frozen, batch)
    calls = {
        "G forward": (forward, (generator, batch)),
        "G forward and backward": (both, (generator, batch)),
        "gradients without R1": (gradients(0.0), everything),
        "gradients": (gradients(config.sfv.r1_weight or 1e-5), everything),
    }
    parts = [Program(name, jax.jit(function), args, {}, function) for name, (function, args) in calls.items()]
    for part in parts:
        yield measure(part, part.args, build(part, mesh), repeats)
    yield measure(program, (state, frozen, batch), build(program, mesh), repeats)


def split(rows: list[Row]) -> dict[str, float]:
    """Returns the seconds of each part of the SF-V step, from the medians of `training`."""
    forward, both, without, gradients, step = (row.timing.median for row in rows)
    return {
        "G forward": forward,
        "G backward": both - forward,
        "D, and its gradient with respect to the fake": without - both,
        "R1": gradients - without,
        "optimizers, EMA, norms": step - gradients,
    }


def table(rows: list[Row], limit: float) -> str:
    """Returns a table in Markdown; `limit` is the device's speed in matrix products in FLOP/s."""
    lines = [
        "| | ms, median (least to most) | TFLOP | TFLOP/s | of the matmul limit | temporary GiB | compiled in s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rate = row.flops / row.timing.median
        memory = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 2**30:.2f}"
        compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        shown = str(row.timing).replace(" ms", "")
        cells = [
            row.name,
            shown,
            f"{row.flops / 1e12:.3g}",
            f"{rate / 1e12:.3g}",
            f"{rate / limit:.0%}",
            memory,
            compiled,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row.flops / row.timing.median > limit for row in rows):
        lines += ["", BUSY]
    return "\n".join(lines)


def record(row: Row) -> dict:
    """Returns `row` for JSON, with the seconds of the warm calls in place of the timing."""
    return {"name": row.name, "seconds": row.timing.seconds} | {
        name: value for name, value in asdict(row).items() if name not in ("name", "timing")
    }


def surroundings() -> dict:
    """Returns date, device, processor and versions of a measurement, for JSON."""
    device = jax.devices()[0]
    about = {"date": time.strftime("%Y-%m-%d"), "device": device.device_kind, "devices": jax.device_count()}
    about |= {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    return about | {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def command_line() -> str:
    """Returns the command that is running, without folders of the machine."""
    command = " ".join(["python -m sfv_jax.benchmark", *sys.argv[1:]])
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        command = f"GLIBC_TUNABLES={tunables} {command}"
    return command


def run(request: Request) -> dict:
    """Carries out a measurement, prints its tables and returns its figures for JSON.

    Raises:
      UserError: if height or width is no multiple of the downscaling.
      ConfigError: if the comparison needs a package that is not installed.
    """
    sizes = request.sizes()
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    limit = timing.matmul_limit(request.dtype)
    about = surroundings()
    result: dict[str, Any] = {"surroundings": about | {"command": command_line()}, "matmul_flops": limit}
    result["peak_flops"] = peak_flops(about["device"])
    print(f"{about['device']}: {limit / 1e12:.3g} TFLOP/s in {request.dtype} matrix products", flush=True)
    if request.compare == "decoders":
        full, tiny = rows = list(decoding(mesh, sizes, request))
        print("\n" + table(rows, limit))
        result["rows"] = [record(row) for row in rows]
        result["ratio"] = full.timing.median / tiny.timing.median
        print(f"full / {request.decoder}: {result['ratio']:.1f} in time, {full.flops / tiny.flops:.1f} in FLOPs")
    elif request.compare:
        from sfv_jax.performance.against_diffusers import against_diffusers

        result["diffusers"] = against_diffusers(
            sizes, request.size, request.batch_size, request.dtype, request.repeats, request.train
        )
    else:
        rows = _rows(request, mesh, sizes)
        print("\n" + table(rows, limit))
        result["rows"] = [record(row) for row in rows]
        result["parts"] = split(rows) if request.train else {}
    for name, seconds in result.get("parts", {}).items():
        print(f"{name}: {1000 * seconds:.1f} ms")
    for peak in peak_memory().values():
        result["peak_gib"] = peak
        print(f"most memory in use on the device: {peak:.2f} GiB")
    return result


def _rows(request: Request, mesh: Mesh, sizes: Sizes) -> list[Row]:
    """Measures sampling or the SF-V step; prints each time as it is measured."""

    def said(row: Row) -> Row:
        print(f"{row.name}: {row.timing}", flush=True)
        return row

    print("compiling and measuring ...", flush=True)
    if not request.train:
        tiny = tiny_sizes(sizes, request.decoder)
        options = SampleOptions(dtype=request.dtype, vae_dtype=request.dtype, tiny=tiny)
        made = sampling(mesh, sizes, request.size, request.batch_size, options, request.repeats)
        return [said(row) for row, *_ in made]
    config = configs.sfv()
    config.update(dict(batch_size=request.batch_size, accumulation_steps=1, dtype=request.dtype))
    if request.networks == "tiny":
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    return [said(row) for row in training(config, mesh, sizes, request.size, request.repeats)]

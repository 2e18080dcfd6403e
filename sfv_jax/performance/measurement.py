"""Measurements of the programs of sampling and training on the device at hand."""

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import jaxlib

from sfv_jax import config as configs
from sfv_jax.diffusion import edm
from sfv_jax.errors import UserError
from sfv_jax.methods import METHODS
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import random_arrays, timing
from sfv_jax.performance.programs import Program, SampleOptions, Sizes, sample_programs, train_program
from sfv_jax.performance.timing import Timing
from sfv_jax.runtime.device import count_flops, peak_flops, peak_memory
from sfv_jax.runtime.sharding import make_mesh, on_mesh


def scaled(*channels: int) -> Sizes:
    """SVD's networks with a UNet of these widths, a VAE of half of them and a tiny CLIP tower."""
    heads = tuple(c // 64 for c in channels)
    unet = dict(block_out_channels=channels, num_attention_heads=heads, cross_attention_dim=64)
    vae = VAEConfig(block_out_channels=tuple(c // 2 for c in channels))
    return Sizes(UNetConfig(addition_time_embed_dim=64, **unet), vae, CLIPConfig.tiny(projection_dim=64))


NETWORKS = {
    "svd": Sizes(UNetConfig.svd(), VAEConfig.svd(), CLIPConfig.svd()),
    "mid": scaled(128, 256, 512, 512),
    "small": scaled(64, 128, 256, 256),
    "tiny": Sizes(UNetConfig.tiny(), VAEConfig.tiny(), CLIPConfig.tiny(projection_dim=32)),
}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
      networks: a name of `NETWORKS`.
      height, width: of the video, pixels.
      num_frames: None for as many as the networks were trained with.
      dtype: compute dtype, also of the VAE's decoder.
      repeats: warm calls that are timed.
      train: the SF-V step instead of sampling, with `remat` if activations are to be computed again.
      compare: "diffusers" to measure that package in turns with ours, on the same weights.
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

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def sizes(self) -> Sizes:
        """The networks.

        Raises:
          UserError: for a size that they cannot make.
        """
        sizes = NETWORKS[self.networks]
        changes = {"num_frames": self.num_frames} if self.num_frames else {}
        if jax.default_backend() == "cpu":
            changes["temporal_conv"] = "matmul"
        sizes = replace(sizes, unet=replace(sizes.unet, remat=self.remat and self.train, **changes))
        if any(side < sizes.downscale or side % sizes.downscale for side in self.size):
            raise UserError(f"--height {self.height} --width {self.width}: both must be multiples of {sizes.downscale}")
        return sizes


@dataclass(frozen=True)
class Row:
    """What was measured of one program.

    Attributes:
      timing: of its calls.
      flops: matrix products and convolutions, counted on the jaxpr; attention as its two products.
      temporary_bytes: temporary memory of the compiled program per device, as XLA reports it.
    """

    name: str
    timing: Timing
    flops: float = 0.0
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


def measure(program: Program, args: tuple, mesh, repeats: int) -> tuple[Row, Callable]:
    """Compiles `program` for `args` (arrays) and times it; returns the compiled program as well.

    A program that gives up its first argument gets its result in that place for the next call, as in training.
    """
    began = time.perf_counter()
    compiled = on_mesh(mesh, program.function.lower)(*args).compile()
    seconds = time.perf_counter() - began
    held = list(args)

    def call():
        out = compiled(*held)
        if program.donates:
            held[0], out = out
        return out

    timed = timing.warm(call, repeats)
    flops, memory = count_flops(program.plain, *program.args), compiled.memory_analysis()
    return Row(program.name, timed, flops, seconds, memory.temp_size_in_bytes), compiled


def sampling(mesh, sizes: Sizes, size: tuple[int, int], batch: int, dtype: str, repeats: int) -> list[Row]:
    """Rows of the stages of a one-step video, and of all of them one after the other."""
    rows, compiled, weights = [], {}, {}
    programs = sample_programs(mesh, sizes, size, batch, SampleOptions(dtype=dtype, vae_dtype=dtype))
    inputs = {}
    for program in programs:
        held, *given = program.args
        for name, part in held.items():
            weights.setdefault(name, random_arrays.random_arrays(part))
        inputs[program.name] = random_arrays.random_arrays(tuple(given))
        args = ({name: weights[name] for name in held}, *inputs[program.name])
        row, compiled[program.name] = measure(program, args, mesh, repeats)
        rows.append(row)

    def run(name: str, *given):
        return compiled[name]({k: weights[k] for k in next(p for p in programs if p.name == name).args[0]}, *given)

    def whole():
        embed = run("clip", inputs["clip"][0])
        latent = run("encode", *inputs["encode"])
        noise, condition = inputs["denoise"]
        return run("decode", run("denoise", noise, condition | {"image_embed": embed, "cond_latent": latent}))

    total = timing.warm(whole, repeats)
    return [*rows, Row("image to frames", total, sum(row.flops for row in rows))]


def training(config, mesh, sizes: Sizes, size: tuple[int, int], repeats: int) -> list[Row]:
    """Rows of the SF-V step and of its parts, each of which is compiled alone.

    Parts that are no programs of their own are differences of medians: the backward pass of the generator, what the
    discriminator adds to it, R1, and the optimisers with EMA and norms. XLA may fuse them otherwise in the whole step.
    """
    program = train_program(config, mesh, sizes, size)
    state, frozen, batch = random_arrays.random_arrays(program.args)
    generator, heads = state["generator"], state["heads"]
    networks = METHODS[config.method].make_networks(sizes.unet, config)

    def forward(generator, batch):
        sigma = jnp.full(len(batch["latents"]), edm.SIGMA_MAX)
        return edm.denoise(networks.generator(generator), edm.SIGMA_MAX * batch["latents"], sigma, batch)

    def both(generator, batch):
        return jax.grad(lambda g: jnp.mean(jnp.square(forward(g, batch))))(generator)

    def gradients(r1_weight: float) -> Callable:
        changed = config.copy_and_resolve_references()
        changed.sfv.r1_weight = r1_weight
        made = METHODS[config.method].make_gradients(networks, changed)
        return lambda *args: made(*args, jax.random.key(0), 0)

    everything = (generator, heads, frozen, batch)
    calls = {
        "G forward": (forward, (generator, batch)),
        "G forward and backward": (both, (generator, batch)),
        "gradients without R1": (gradients(0.0), everything),
        "gradients": (gradients(config.sfv.r1_weight or 1e-5), everything),
    }
    rows = [
        measure(Program(name, jax.jit(function), args, {}, function), args, mesh, repeats)[0]
        for name, (function, args) in calls.items()
    ]
    step, _ = measure(program, (state, frozen, batch), mesh, repeats)
    return [*rows, step]


def split(rows: list[Row]) -> dict[str, float]:
    """Seconds of the parts of the SF-V step, from the medians of `training`."""
    forward, both, without, gradients, step = (row.timing.median for row in rows)
    return {
        "G forward": forward,
        "G backward": both - forward,
        "D, and the way of its gradient to the fake": without - both,
        "R1": gradients - without,
        "optimisers, EMA, norms": step - gradients,
    }


def table(rows: list[Row], limit: float) -> str:
    """Markdown; `limit` in FLOP/s."""
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
    return "\n".join(lines)


def record(row: Row) -> dict:
    """Returns `row` for JSON: the seconds of its warm calls in place of its timing."""
    return {"name": row.name, "seconds": row.timing.seconds} | {
        name: value for name, value in asdict(row).items() if name not in ("name", "timing")
    }


def surroundings() -> dict:
    """What the figures depend on."""
    device = jax.devices()[0]
    about = {"date": time.strftime("%Y-%m-%d"), "device": device.device_kind, "devices": jax.device_count()}
    about |= {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    command = " ".join(["python -m sfv_jax.benchmark", *sys.argv[1:]])
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        command = f"GLIBC_TUNABLES={tunables} {command}"
    return about | {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "command": command}


def run(request: Request) -> dict:
    """Measures and prints what `request` names; returns the figures, JSON.

    Raises:
      UserError: see `Request.sizes`.
    """
    sizes = request.sizes()
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    limit = timing.matmul_limit(request.dtype)
    about = surroundings()
    result = {"surroundings": about, "matmul_flops": limit, "peak_flops": peak_flops(about["device"])}
    print(f"{about['device']}: {limit / 1e12:.3g} TFLOP/s in {request.dtype} matrix products", flush=True)
    if request.compare:
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


def _rows(request: Request, mesh, sizes: Sizes) -> list[Row]:
    """Rows of sampling, or of the SF-V step."""
    if not request.train:
        return sampling(mesh, sizes, request.size, request.batch_size, request.dtype, request.repeats)
    config = configs.sfv()
    config.update(dict(batch_size=request.batch_size, accumulation_steps=1, dtype=request.dtype))
    if request.networks == "tiny":
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    return training(config, mesh, sizes, request.size, request.repeats)

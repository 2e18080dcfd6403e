"""Times the networks, warm and apart from compilation, beside the matmul limit of the same device in the same run.

    python -m sfv_jax.benchmark                                              # SVD, 14 x 576 x 1024, bf16
    python -m sfv_jax.benchmark --train --height 448 --width 768             # the SF-V step and its parts
    python -m sfv_jax.benchmark --networks mid --num_frames 8 --height 256 --width 384 --dtype float32 \
        --compare diffusers                                                  # against torch, on the same weights

`--compare` times the UNet, the VAE decoder and the whole way from images to frames in turns with diffusers'; with
`--train` the UNet's forward pass, and its forward and backward pass. Weights are random: time does not depend on them.
The programs are those that `sample` and `train` run. Needs jax, flax, optax, orbax, einops and numpy; `--compare` also
torch and diffusers.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from absl import app, flags, logging

from sfv_jax import config as configs
from sfv_jax import timing
from sfv_jax.config import ConfigError
from sfv_jax.diffusion import edm
from sfv_jax.methods import METHODS
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.programs import Program, Sizes, sample_programs, train_program
from sfv_jax.runtime import compilation
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
class Row:
    """What was measured of one program.

    Attributes:
      seconds: of each warm call.
      flops: of matrix products and convolutions, counted on the jaxpr; attention as its two products.
      temporary_bytes: of the compiled program, by XLA, per device.
    """

    name: str
    seconds: tuple[float, ...]
    flops: float | None = None
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
        if program.name == "train step":
            held[0], out = out
        return out

    timed = timing.warm(call, repeats)
    memory = compiled.memory_analysis()
    row = Row(
        program.name, timed.seconds, count_flops(program.plain, *program.args), seconds, memory.temp_size_in_bytes
    )
    return row, compiled


def sampling(mesh, sizes: Sizes, size: tuple[int, int], batch: int, dtype: str, repeats: int) -> list[Row]:
    """Rows of the stages of a one-step video, and of all of them one after the other."""
    rows, compiled, weights = [], {}, {}
    programs = sample_programs(mesh, sizes, size, batch, dtype=dtype, vae_dtype=dtype)
    inputs = {}
    for program in programs:
        held, *given = program.args
        for name, part in held.items():
            weights.setdefault(name, timing.random_arrays(part))
        inputs[program.name] = timing.random_arrays(tuple(given))
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
    return [*rows, Row("image to frames", total.seconds, sum(row.flops for row in rows))]


def training(config, mesh, sizes: Sizes, size: tuple[int, int], repeats: int) -> list[Row]:
    """Rows of the SF-V step and of its parts, each of which is compiled alone.

    Parts that are no programs of their own are differences of medians: the backward pass of the generator, what the
    discriminator adds to it, R1, and the optimisers with EMA and norms. XLA may fuse them otherwise in the whole step.
    """
    program = train_program(config, mesh, sizes, size)
    state, frozen, batch = timing.random_arrays(program.args)
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
    forward, both, without, gradients, step = (timing.Timing(row.seconds).median for row in rows)
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
        timed = timing.Timing(row.seconds)
        rate = row.flops / timed.median
        memory = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 2**30:.2f}"
        compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
        shown = str(timed).replace(" ms", "")
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


def surroundings() -> dict:
    """What the figures depend on."""
    device = jax.devices()[0]
    about = {"date": time.strftime("%Y-%m-%d"), "device": device.device_kind, "devices": jax.device_count()}
    about |= {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    command = " ".join(["python -m sfv_jax.benchmark", *sys.argv[1:]])
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        command = f"GLIBC_TUNABLES={tunables} {command}"
    return about | {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "command": command}


FLAGS = flags.FLAGS


def sizes_from_flags() -> tuple[Sizes, tuple[int, int]]:
    """(networks, (height, width)).

    Raises:
      ConfigError: for a size that the networks cannot make.
    """
    sizes = NETWORKS[FLAGS.networks]
    if FLAGS.num_frames:
        sizes = replace(sizes, unet=replace(sizes.unet, num_frames=FLAGS.num_frames))
    if jax.default_backend() == "cpu":
        sizes = replace(sizes, unet=replace(sizes.unet, temporal_conv="matmul"))
    size = FLAGS.height, FLAGS.width
    if any(side < sizes.downscale or side % sizes.downscale for side in size):
        raise ConfigError(f"--height {size[0]} --width {size[1]}: both must be multiples of {sizes.downscale}")
    return sizes, size


def stages(mesh, sizes: Sizes, size: tuple[int, int]) -> list[Row]:
    """Of sampling, or of the SF-V step, as the flags say."""
    if not FLAGS.train:
        return sampling(mesh, sizes, size, FLAGS.batch_size, FLAGS.dtype, FLAGS.repeats)
    config = configs.sfv()
    config.update(dict(batch_size=FLAGS.batch_size, accumulation_steps=1, dtype=FLAGS.dtype))
    if FLAGS.networks == "tiny":
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    sizes = replace(sizes, unet=replace(sizes.unet, remat=FLAGS.remat))
    return training(config, mesh, sizes, size, FLAGS.repeats)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    compilation.keep_memory()
    if FLAGS.compare:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    try:
        sizes, size = sizes_from_flags()
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        limit = timing.matmul_limit(FLAGS.dtype)
        about = surroundings()
        result = {"surroundings": about, "matmul_flops": limit, "peak_flops": peak_flops(about["device"])}
        print(f"{about['device']}: {limit / 1e12:.3g} TFLOP/s in {FLAGS.dtype} matrix products", flush=True)
        if FLAGS.compare:
            from sfv_jax.peer import against_diffusers

            found = against_diffusers(sizes, size, FLAGS.batch_size, FLAGS.dtype, FLAGS.repeats, FLAGS.train)
            result["diffusers"] = found
        else:
            rows = stages(mesh, sizes, size)
            print("\n" + table(rows, limit))
            result["rows"] = [asdict(row) for row in rows]
            result["parts"] = split(rows) if FLAGS.train else {}
        for name, seconds in result.get("parts", {}).items():
            print(f"{name}: {1000 * seconds:.1f} ms")
        for peak in peak_memory().values():
            result["peak_gib"] = peak
            print(f"most memory in use on the device: {peak:.2f} GiB")
    except ConfigError as error:
        sys.exit(f"benchmark: {error}")
    if FLAGS.json:
        path = Path(FLAGS.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_enum("networks", "svd", list(NETWORKS), "sizes of the networks")
    flags.DEFINE_integer("height", 576, "of the video, pixels")
    flags.DEFINE_integer("width", 1024, "of the video, pixels")
    flags.DEFINE_integer("num_frames", None, "frames; those of the networks by default", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "videos at a time", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "compute dtype, also of the VAE decoder")
    flags.DEFINE_integer("repeats", 10, "warm calls that are timed", lower_bound=1)
    flags.DEFINE_boolean("train", False, "the SF-V step instead of sampling")
    flags.DEFINE_boolean("remat", False, "recompute activations in the backward pass")
    flags.DEFINE_enum(
        "compare",
        None,
        ["diffusers"],
        "time that package's UNet, decoder and pipeline instead, in turns with ours, on the same weights; with --train"
        " the UNet forward, and forward and backward",
    )
    flags.DEFINE_string("json", None, "write what was measured to this file")
    app.run(main)

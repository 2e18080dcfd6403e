"""Stages of the accelerator check; each runs in a process of its own.

    python -m sfv_jax.performance.accelerator_stages --stage NAME --out DIR [--tiny]

A stage writes its figures to `DIR/NAME.json` after each of them. `sfv_jax.performance.accelerator_check` starts the
stages one after another.
"""

import json
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from jax.stages import Compiled

from sfv_jax import config as configs
from sfv_jax.errors import UserError
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import measurement, random_arrays, targets
from sfv_jax.performance.cost import read
from sfv_jax.performance.measurement import NETWORKS, Built, Row, build, measure
from sfv_jax.performance.programs import Program, SampleOptions, Sizes, sample_programs, train_program
from sfv_jax.performance.timing import matmul_limit, warm
from sfv_jax.runtime import commands
from sfv_jax.runtime.device import count_flops, peak_flops, peak_memory
from sfv_jax.runtime.files import replacing, write_json
from sfv_jax.runtime.sharding import make_mesh, on_mesh
from sfv_jax.runtime.versions import package_versions

FLAGS = flags.FLAGS
BY_VALUE = ("denoise", "decode", "clip", "encode")  # programs of sampling, most valuable first


class Figures(dict):
    """Figures of a stage; the file is written anew after each of them."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def __setitem__(self, name: str, value) -> None:
        super().__setitem__(name, value)
        write_json(self.path, self)
        print(f"{self.path.stem}: {name}", flush=True)


def device(found: Figures, tiny: bool) -> None:
    """Records device, versions, the matrix-product limits in bf16 and fp32, and copy bandwidth."""
    found["surroundings"] = measurement.surroundings()
    names = ("jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "diffusers")
    found["packages"] = package_versions("jax", *names)
    found["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    found["peak_flops"] = peak_flops(jax.devices()[0].device_kind)
    if smi := shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        found["nvidia_smi"] = done.stdout.splitlines()
    for dtype in ("bfloat16", "float32"):
        found[f"matmul_flops_{dtype}"] = matmul_limit(dtype, 512 if tiny else None)
    size = 2**20 if tiny else 2**28
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(size, jnp.float32)
    found["copy_bytes_per_second"] = 2 * x.nbytes / warm(lambda: copy(x), 5).best
    found["memory"] = peak_memory()


def parity(found: Figures, tiny: bool) -> None:
    """Compares networks and the gradient of the train step on this device with stored and CPU results.

    Raises:
      UserError: if a difference is over its bound; all differences are in the figures.
    """
    from tests.support import device_parity  # the golden files and their inputs are part of the tests

    names = ["clip"] if tiny else device_parity.NETWORKS  # a CPU compiles slowly
    for name, figures in device_parity.compare(names):
        found[name] = figures
    if over := [name for name, figures in found.items() if not figures["sound"]]:
        raise UserError(f"parity is over its bound: {', '.join(over)}")


def sampling(found: Figures, tiny: bool) -> None:
    """Times the programs of a one-step video, most valuable first, then all in a row, then the UNet with guidance."""
    sizes, size, mesh = _networks(tiny)
    repeats = 2 if tiny else 10
    load = partial(load_or_build, found.path.parent)
    rows = measurement.sampling(mesh, sizes, size, 1, _options(tiny), repeats, BY_VALUE, load)
    for row, program, compiled in rows:
        found[row.name] = _figures(row, program, compiled)
    found["memory"] = peak_memory()
    program = _guided(mesh, sizes, size, tiny)
    found[program.name], _ = _timed(found, program, mesh, repeats)


def diffusers(found: Figures, tiny: bool) -> None:
    """Times UNet, VAE decoder and pipeline of diffusers in turns with ours, on the same random weights."""
    from sfv_jax.performance.against_diffusers import against_diffusers

    sizes, size, _ = _networks(tiny)
    dtype = "float32" if tiny else "bfloat16"

    def note(stage: str, times: dict) -> None:
        found[stage] = times

    against_diffusers(sizes, size, 1, dtype, 1 if tiny else 5, False, note)


def train(found: Figures, tiny: bool) -> None:
    """Times the SF-V step on one video of 448x768, with its MFU, its memory and the plan's account."""
    program, mesh = _train_step(tiny)
    found[program.name], _ = _timed(found, program, mesh, 1 if tiny else 5)
    found["memory"] = peak_memory()


def extras(found: Figures, tiny: bool) -> None:
    """Times a tiny decoder and profiles one UNet call, then times 25 frames and batch 2."""
    sizes, size, mesh = _networks(tiny)
    repeats = 1 if tiny else 5
    small = replace(_options(tiny), tiny=measurement.tiny_sizes(sizes, "tiny"))
    program = _sampling_program("decode", mesh, sizes, size, small, name="decode, tiny decoder")
    found[program.name], _ = _timed(found, program, mesh, repeats)
    denoise = partial(_sampling_program, "denoise", mesh, size=size, options=_options(tiny))
    found["denoise"], call = _timed(found, denoise(sizes), mesh, repeats)
    with jax.profiler.trace(str(found.path.parent / "profile")):
        jax.block_until_ready(call())
    found["profile"] = {"folder": "profile", "of": "one call of the UNet"}
    del call
    longer = replace(sizes, unet=replace(sizes.unet, num_frames=2 * sizes.unet.num_frames if tiny else 25))
    for program in (denoise(longer, name="denoise, 25 frames"), denoise(sizes, name="denoise, batch 2", batch=2)):
        found[program.name], _ = _timed(found, program, mesh, repeats)


def _networks(tiny: bool) -> tuple[Sizes, tuple[int, int], Mesh]:
    """Returns (networks, (height, width), mesh) of the sampling stages."""
    sizes = NETWORKS["svd"]
    if tiny:  # diffusers' VAE needs 32 channels
        unet = UNetConfig.tiny(block_out_channels=(32,), num_attention_heads=(2,), layers_per_block=1, num_frames=2)
        vae = VAEConfig.tiny(block_out_channels=(32, 32), layers_per_block=1)
        sizes = Sizes(unet, vae, CLIPConfig.tiny(projection_dim=32))
    return sizes, (64, 64) if tiny else (576, 1024), make_mesh(1, 1, 1, devices=jax.devices()[:1])


def _options(tiny: bool) -> SampleOptions:
    dtype = "float32" if tiny else "bfloat16"
    return SampleOptions(dtype=dtype, vae_dtype=dtype)


def _sampling_program(
    stage: str, mesh: Mesh, sizes: Sizes, size: tuple[int, int], options: SampleOptions, name: str = "", batch: int = 1
) -> Program:
    """Returns one of `sample_programs`, under another name if `name` is given."""
    programs = sample_programs(mesh, sizes, size, batch, options)
    return replace(next(program for program in programs if program.name == stage), name=name or stage)


def _guided(mesh: Mesh, sizes: Sizes, size: tuple[int, int], tiny: bool) -> Program:
    options = replace(_options(tiny), guidance=(1.0, 3.0))
    return _sampling_program("denoise", mesh, sizes, size, options, name="denoise, guided")


def _train_step(tiny: bool) -> tuple[Program, Mesh]:
    """Returns (program, mesh) of the SF-V step on one video."""
    sizes, _, mesh = _networks(tiny)
    config = configs.sfv()
    config.update(dict(batch_size=1, accumulation_steps=1, dtype="float32" if tiny else "bfloat16"))
    if tiny:
        config.trainable = "conv_out"  # compiles in a third of the time
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    return train_program(config, mesh, sizes, (64, 64) if tiny else (448, 768)), mesh


def _timed(found: Figures, program: Program, mesh: Mesh, repeats: int) -> tuple[dict, Callable]:
    """Times a program on random arrays; returns its figures and the call."""
    built = load_or_build(found.path.parent, program, mesh)
    arguments = random_arrays.random_arrays(program.args)
    row = measure(program, arguments, built, repeats)
    return _figures(row, program, built.compiled), lambda: built.compiled(*arguments)


def _figures(row: Row, program: Program | None = None, compiled: Compiled | None = None) -> dict:
    """Returns the figures of a measurement beside the plan's account of the same compiled program."""
    peak = peak_flops(jax.devices()[0].device_kind)
    figures: dict[str, Any] = {
        "seconds": row.timing.seconds,
        "flops": row.flops,
        "tflops": row.flops / row.timing.median / 1e12,
        "mfu": row.flops / row.timing.median / peak if peak else None,
        "compile_seconds": row.compile_seconds,
        "temporary_bytes": row.temporary_bytes,
    }
    target = _target()
    if target and program and compiled:
        cost = read(program, compiled, target, 1, target.chip.memory)
        figures["plan"] = {
            "needed_bytes": cost.needed,
            "roofline_seconds": cost.roofline,
            "kernel_flops": cost.flops,
            "kernel_bytes": cost.bytes,
            "custom_kernels": cost.kernels,
            "fused_attention": cost.flash,
            "compiler_peak_bytes": cost.peak,
        }
    return figures


def _target() -> targets.Target | None:
    """Returns the planner's description of the device at hand; None if it has none."""
    kind = jax.devices()[0].device_kind.lower()
    if jax.default_backend() == "cpu":
        return targets.parse("cpu:1")
    known = {"h200": "h200", "h100": "h100", "a100": "a100-80"}
    name = next((name for part, name in known.items() if part in kind), None)
    return targets.parse(f"{name}:1") if name else None


def compile_ahead(out: Path, stage: str, tiny: bool) -> None:
    """Compiles the programs of a stage into `out`, then counts their FLOPs; nothing is run.

    A process that loads such a program does not trace it: of the full train step that takes longer than the compiler.
    """
    if stage == "train":
        program, mesh = _train_step(tiny)
        programs = [program]
    else:
        sizes, size, mesh = _networks(tiny)
        plain = {program.name: program for program in sample_programs(mesh, sizes, size, 1, _options(tiny))}
        programs = [*(plain[name] for name in BY_VALUE), _guided(mesh, sizes, size, tiny)]
    for program in programs:
        began = time.monotonic()
        compiled = on_mesh(mesh, program.function.lower)(*program.args).compile()
        with replacing(_ahead(out, program)) as temporary:
            temporary.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        print(f"compiled ahead: {stage} {program.name} in {time.monotonic() - began:.0f} s", flush=True)
    for program in programs:
        write_json(_ahead(out, program).with_suffix(".json"), {"flops": count_flops(program.plain, *program.args)})


def load_or_build(out: Path, program: Program, mesh: Mesh) -> Built:
    """Loads a program that was compiled ahead, or compiles it."""
    path = _ahead(out, program)
    if not path.is_file():
        return build(program, mesh)
    began = time.monotonic()
    compiled = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    seconds = time.monotonic() - began
    counted = path.with_suffix(".json")
    flops = json.loads(counted.read_text())["flops"] if counted.is_file() else count_flops(program.plain, *program.args)
    return Built(compiled, seconds, flops)


def _ahead(out: Path, program: Program) -> Path:
    return out / "compiled" / f"{program.name}.pickle"


STAGES: dict[str, Callable[[Figures, bool], None]] = {
    "device": device,
    "parity": parity,
    "sampling": sampling,
    "diffusers": diffusers,
    "train": train,
    "extras": extras,
}


def main() -> None:
    if FLAGS.ahead:
        compile_ahead(Path(FLAGS.out), FLAGS.stage, FLAGS.tiny)
    else:
        STAGES[FLAGS.stage](Figures(Path(FLAGS.out) / f"{FLAGS.stage}.json"), FLAGS.tiny)


def define_flags() -> None:
    flags.DEFINE_enum("stage", None, list(STAGES), "stage to run", required=True)
    flags.DEFINE_bool("ahead", False, "only compile the programs of the stage into the compilation cache")
    flags.DEFINE_string("out", None, "folder for the figures", required=True)
    flags.DEFINE_bool("tiny", False, "tiny networks: a rehearsal on a CPU")


if __name__ == "__main__":
    commands.run(main, define_flags)

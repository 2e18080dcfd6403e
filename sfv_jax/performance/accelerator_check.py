"""Measurement of a new accelerator in a few minutes, run by `launch/accelerator_check.sh`.

    python -m sfv_jax.performance.accelerator_check --out DIR [--minutes 8] [--tiny]

Stages run one after the other in the order of their value, each in a process of its own with a time limit: device,
parity, sampling, diffusers, train, extras. While parity runs, the programs of later stages are compiled ahead in
parallel processes, into the compilation cache `DIR/compiled`. A stage writes `DIR/STAGE.json` after each figure, and
after each stage `DIR/results.json` and `DIR/results.md` hold all that is known, so a cut loses nothing. A stage that
fails, hangs or runs out of memory does not touch the results of the others.

It needs jax, flax, optax, orbax, einops, numpy and, for the parity stage, the repository's `tests` folder; the stage
`diffusers` also torch and diffusers.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags

from sfv_jax.errors import UserError
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import replacing, write_json
from sfv_jax.runtime.platforms import end_group
from sfv_jax.runtime.versions import package_versions

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[2]
BY_VALUE = ("denoise", "decode", "clip", "encode")  # programs of sampling, most valuable first
LEAST = 10.0  # seconds below which a stage is not started
AHEAD = ("sampling", "train")  # stages whose programs are compiled while parity runs


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
    import jax
    import jax.numpy as jnp

    from sfv_jax.performance.measurement import surroundings
    from sfv_jax.performance.timing import matmul_limit, warm
    from sfv_jax.runtime.device import peak_flops, peak_memory

    found["surroundings"] = surroundings()
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
    """Compares networks and the gradient of the train step on this device with stored and CPU results."""
    del tiny
    from tests.support import device_parity

    for name, figures in device_parity.compare():
        found[name] = figures


def sampling(found: Figures, tiny: bool) -> None:
    """Times the programs of a one-step video, most valuable first, then all in a row, then the UNet with guidance."""
    import jax

    from sfv_jax.performance import random_arrays
    from sfv_jax.performance.timing import warm
    from sfv_jax.runtime.device import peak_memory

    sizes, size, mesh = _networks(tiny)
    repeats = 2 if tiny else 10
    programs = _stages_of(mesh, sizes, size, _options(tiny))
    weights, inputs, compiled = {}, {}, {}
    for name in BY_VALUE:
        program = programs[name]
        held, *given = program.args
        weights |= {k: random_arrays.random_arrays(part) for k, part in held.items() if k not in weights}
        inputs[name] = random_arrays.random_arrays(tuple(given))
        arguments = ({k: weights[k] for k in held}, *inputs[name])
        found[name], compiled[name] = _measured(program, arguments, mesh, repeats)

    def run(name: str, *given):
        return compiled[name]({k: weights[k] for k in programs[name].args[0]}, *given)

    def whole():
        noise, condition = inputs["denoise"]
        made = {"image_embed": run("clip", inputs["clip"][0]), "cond_latent": run("encode", *inputs["encode"])}
        frames, _ = run("decode", run("denoise", noise, condition | made))
        return jax.device_get(frames)

    found["image to frames"] = {"seconds": warm(whole, repeats).seconds}
    found["memory"] = peak_memory()
    program = _stages_of(mesh, sizes, size, _guided(tiny))["denoise"]
    arguments = ({"unet": weights["unet"]}, *inputs["denoise"])
    found["denoise, guided"], _ = _measured(program, arguments, mesh, repeats)


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
    from sfv_jax.performance import random_arrays
    from sfv_jax.runtime.device import peak_memory

    program, mesh = _train_step(tiny)
    arguments = random_arrays.random_arrays(program.args)
    found["train step"], _ = _measured(program, arguments, mesh, 1 if tiny else 5)
    found["memory"] = peak_memory()


def extras(found: Figures, tiny: bool) -> None:
    """Profiles one UNet call, then times 25 frames and batch 2. A tiny decoder and int8 are not in this version."""
    import jax

    from sfv_jax.performance import random_arrays

    sizes, size, mesh = _networks(tiny)
    repeats = 1 if tiny else 5

    def denoise(sizes, batch: int):
        program = _stages_of(mesh, sizes, size, _options(tiny), batch)["denoise"]
        arguments = random_arrays.random_arrays(program.args)
        figures, compiled = _measured(program, arguments, mesh, repeats)
        return figures, lambda: compiled(*arguments)

    found["denoise"], call = denoise(sizes, 1)
    with jax.profiler.trace(str(found.path.parent / "profile")):
        jax.block_until_ready(call())
    found["profile"] = {"folder": "profile", "of": "one call of the UNet"}
    del call
    longer = replace(sizes, unet=replace(sizes.unet, num_frames=25))
    found["denoise, 25 frames"] = denoise(longer, 1)[0]
    found["denoise, batch 2"] = denoise(sizes, 2)[0]


def _networks(tiny: bool):
    """Returns (networks, (height, width), mesh) of the sampling stages."""
    import jax

    from sfv_jax.models.clip import CLIPConfig
    from sfv_jax.models.unet import UNetConfig
    from sfv_jax.models.vae import VAEConfig
    from sfv_jax.performance.measurement import NETWORKS
    from sfv_jax.performance.programs import Sizes
    from sfv_jax.runtime.sharding import make_mesh

    sizes = NETWORKS["svd"]
    if tiny:  # diffusers' VAE needs 32 channels
        unet = UNetConfig.tiny(block_out_channels=(32, 32), num_attention_heads=(2, 2), num_frames=2)
        vae = VAEConfig.tiny(block_out_channels=(32, 32), layers_per_block=1)
        sizes = Sizes(unet, vae, CLIPConfig.tiny(projection_dim=32))
    if jax.default_backend() == "cpu":
        sizes = replace(sizes, unet=replace(sizes.unet, temporal_conv="matmul"))
    return sizes, (64, 64) if tiny else (576, 1024), make_mesh(1, 1, 1, devices=jax.devices()[:1])


def _options(tiny: bool):
    from sfv_jax.performance.programs import SampleOptions

    dtype = "float32" if tiny else "bfloat16"
    return SampleOptions(dtype=dtype, vae_dtype=dtype)


def _guided(tiny: bool):
    return replace(_options(tiny), guidance=(1.0, 3.0))


def _stages_of(mesh, sizes, size: tuple[int, int], options, batch: int = 1) -> dict:
    """Returns the programs of sampling by name."""
    from sfv_jax.performance.programs import sample_programs

    return {program.name: program for program in sample_programs(mesh, sizes, size, batch, options)}


def _train_step(tiny: bool):
    """Returns (program, mesh) of the SF-V step on one video."""
    from sfv_jax import config as configs
    from sfv_jax.performance.programs import train_program

    sizes, _, mesh = _networks(tiny)
    config = configs.sfv()
    config.update(dict(batch_size=1, accumulation_steps=1, dtype="float32" if tiny else "bfloat16"))
    if tiny:
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=16)
    return train_program(config, mesh, sizes, (64, 64) if tiny else (448, 768)), mesh


def _measured(program, arguments: tuple, mesh, repeats: int) -> tuple[dict, Callable]:
    """Times a program; returns its figures beside the plan's account of the same compiled program, and that program."""
    import jax

    from sfv_jax.performance.cost import read
    from sfv_jax.performance.measurement import measure
    from sfv_jax.runtime.device import peak_flops

    row, compiled = measure(program, arguments, mesh, repeats)
    peak = peak_flops(jax.devices()[0].device_kind)
    figures: dict[str, Any] = {
        "seconds": row.timing.seconds,
        "flops": row.flops,
        "tflops": row.flops / row.timing.median / 1e12,
        "mfu": row.flops / row.timing.median / peak if peak else None,
        "compile_seconds": row.compile_seconds,
        "temporary_bytes": row.temporary_bytes,
    }
    if target := _target():
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
    return figures, compiled


def _target():
    """Returns the planner's description of the device at hand; None if it has none."""
    import jax

    from sfv_jax.performance.targets import parse

    kind = jax.devices()[0].device_kind.lower()
    if jax.default_backend() == "cpu":
        return parse("cpu:1")
    known = {"h200": "h200", "h100": "h100", "a100": "a100-80"}
    name = next((name for part, name in known.items() if part in kind), None)
    return parse(f"{name}:1") if name else None


def compile_ahead(stage: str, tiny: bool) -> None:
    """Compiles the programs of a stage into the compilation cache; nothing is run."""
    from sfv_jax.runtime.sharding import on_mesh

    if stage == "train":
        program, mesh = _train_step(tiny)
        programs = [program]
    else:
        sizes, size, mesh = _networks(tiny)
        plain = _stages_of(mesh, sizes, size, _options(tiny))
        programs = [plain[name] for name in BY_VALUE]
        programs.append(_stages_of(mesh, sizes, size, _guided(tiny))["denoise"])
    for program in programs:
        began = time.monotonic()
        on_mesh(mesh, program.function.lower)(*program.args).compile()
        print(f"compiled ahead: {stage} {program.name} in {time.monotonic() - began:.0f} s", flush=True)


STAGES: dict[str, tuple[Callable[[Figures, bool], None], float]] = {  # in order of value, with limits in seconds
    "device": (device, 60),
    "parity": (parity, 100),
    "sampling": (sampling, 150),
    "diffusers": (diffusers, 150),
    "train": (train, 150),
    "extras": (extras, 120),
}


@dataclass
class Outcome:
    """End of a stage: its status ("done", "failed", "cut" or "skipped"), its seconds, and the reason."""

    status: str
    seconds: float = 0.0
    reason: str = ""


def run(out: Path, minutes: float, tiny: bool, only: list[str] | None = None) -> dict[str, Outcome]:
    """Runs the stages within `minutes` and returns how each ended; the figures are in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    ahead: list[subprocess.Popen] = []
    for name, (_, limit) in STAGES.items():
        if only and name not in only:
            continue
        if name == "parity":  # after the limits were measured on an idle device; nothing is timed meanwhile
            ahead = [_start(out, f"ahead-{later}", tiny) for later in AHEAD if not only or later in only]
        left = deadline - time.monotonic()
        if left < LEAST:
            outcomes[name] = Outcome("skipped", reason="no time left")
        else:
            while ahead and name != "parity":  # programs compiled so far are in the cache
                _end(ahead.pop(), max(min(left / 3, 60.0), 1.0))
            outcomes[name] = _finish(_start(out, name, tiny), out / f"{name}.log", min(limit, left))
        print(f"{name}: {outcomes[name].status} {outcomes[name].reason}", flush=True)
        write_results(out, outcomes)
    for process in ahead:
        _end(process, 0.0)
    return outcomes


def _start(out: Path, stage: str, tiny: bool) -> subprocess.Popen:
    """Starts the process of a stage in a group of its own, with a log beside its figures."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out.resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "sfv_jax.performance.accelerator_check", f"--stage={stage}", f"--out={out}"]
    if tiny:  # a rehearsal compiles soon and runs slowly
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    with (out / f"{stage}.log").open("w") as log:
        return subprocess.Popen(
            [*command, f"--tiny={tiny}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def _finish(process: subprocess.Popen, log: Path, limit: float) -> Outcome:
    """Waits for a stage up to `limit` seconds, then ends it and all that it started."""
    began = time.monotonic()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        _end(process, 0.0)
        return Outcome("cut", time.monotonic() - began, f"after {limit:.0f} s")
    seconds = time.monotonic() - began
    if code == 0:
        return Outcome("done", seconds)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome("failed", seconds, f"exit code {code}: {lines[-1][:300] if lines else 'nothing printed'}")


def _end(process: subprocess.Popen, patience: float) -> None:
    """Waits `patience` seconds for a process, then kills its group."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        end_group(process)
        process.wait()


def write_results(out: Path, outcomes: dict[str, Outcome]) -> None:
    """Writes `results.json` and `results.md`: how each stage ended, and the figures there are."""
    figures = {}
    for name in outcomes:
        path = out / f"{name}.json"
        figures[name] = json.loads(path.read_text()) if path.is_file() else {}
    stages = {name: asdict(outcome) for name, outcome in outcomes.items()}
    write_json(out / "results.json", {"stages": stages, "figures": figures})
    with replacing(out / "results.md") as temporary:
        temporary.write_text(markdown(stages, figures) + "\n")


# Label, place in the results, goal or anchor.
ROWS = (
    ("UNet, one call, 14 x 576 x 1024, bf16", ("sampling", "denoise"), "goal: at most 95 on an H200"),
    ("UNet with guidance", ("sampling", "denoise, guided"), "SF-V's paper: 300 per call on an A100"),
    ("VAE decoder, 14 frames", ("sampling", "decode"), ""),
    ("CLIP", ("sampling", "clip"), ""),
    ("VAE encoder, one image", ("sampling", "encode"), ""),
    ("image to frames, one step", ("sampling", "image to frames"), "goal: at most 400 on an H200"),
    ("SF-V train step, 448 x 768, batch 1", ("train", "train step"), "goal: at least 45 % MFU within 80 GB"),
    ("UNet, 25 frames", ("extras", "denoise, 25 frames"), ""),
    ("UNet, batch 2", ("extras", "denoise, batch 2"), ""),
)


def markdown(stages: dict, figures: dict) -> str:
    """Returns the tables of `docs/benchmarks.md`; a figure that is missing is a dash."""
    import statistics

    about = figures.get("device", {})
    around = about.get("surroundings", {})
    lines = [
        f"{around.get('device', 'unknown device')}, {around.get('date', 'no date')}, jax {around.get('jax', '?')}."
    ]
    limit = about.get("matmul_flops_bfloat16")
    if limit:
        copies = about.get("copy_bytes_per_second", 0) / 1e9
        lines.append(f"Matrix products: {limit / 1e12:.3g} TFLOP/s in bf16. Copies: {copies:.3g} GB/s.")
    lines += ["", "| figure | median ms (least to most) | TFLOP/s | MFU | plan's bound, ms | goal or anchor |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for label, (stage, name), anchor in ROWS:
        found = figures.get(stage, {}).get(name)
        if not found:
            lines.append(f"| {label} | - | - | - | - | {anchor} |")
            continue
        low, middle, high = (1e3 * f(found["seconds"]) for f in (min, statistics.median, max))
        rate = f"{found['tflops']:.3g}" if found.get("tflops") else "-"
        share = f"{found['mfu']:.0%}" if found.get("mfu") else "-"
        bound = f"{1e3 * found['plan']['roofline_seconds']:.1f}" if found.get("plan") else "-"
        lines.append(f"| {label} | {middle:.1f} ({low:.1f} to {high:.1f}) | {rate} | {share} | {bound} | {anchor} |")
    for stage, times in figures.get("diffusers", {}).items():
        ours = statistics.median(times["sfv_jax"])
        for peer in ("diffusers", "torch.compile"):
            if peer in times:
                ratio = statistics.median(times[peer]) / ours
                goal = "goal: at least 1.3 times" if peer == "torch.compile" else ""
                lines.append(f"| {stage}: {peer} over ours | {ratio:.2f} times | - | - | - | {goal} |")
    lines += ["", "| stage | ended | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {name} | {s['status']} | {s['seconds']:.0f} | {s['reason']} |" for name, s in stages.items()]
    return "\n".join(lines)


def main() -> int:
    out = Path(FLAGS.out)
    if FLAGS.stage.startswith("ahead-"):
        compile_ahead(FLAGS.stage.removeprefix("ahead-"), FLAGS.tiny)
        return 0
    if FLAGS.stage:
        STAGES[FLAGS.stage][0](Figures(out / f"{FLAGS.stage}.json"), FLAGS.tiny)
        return 0
    unknown = [name for name in FLAGS.only or [] if name not in STAGES]
    if unknown:
        raise UserError(f"--only={','.join(unknown)}: choose from {', '.join(STAGES)}")
    outcomes = run(out, FLAGS.minutes, FLAGS.tiny, FLAGS.only)
    print("\n" + (out / "results.md").read_text())
    return 0 if all(outcome.status == "done" for outcome in outcomes.values()) else 1


def define_flags() -> None:
    flags.DEFINE_string("out", None, "folder for the results", required=True)
    flags.DEFINE_float("minutes", 8.0, "time for everything", lower_bound=0.1)
    flags.DEFINE_bool("tiny", False, "tiny networks: a rehearsal on a CPU")
    flags.DEFINE_list("only", None, f"stages to run: {', '.join(STAGES)}; default: all")
    flags.DEFINE_enum("stage", "", ["", *STAGES, *(f"ahead-{name}" for name in AHEAD)], "run one stage in this process")


if __name__ == "__main__":
    commands.run(main, define_flags)

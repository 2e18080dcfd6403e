"""What one compiled program costs on a target: memory by what it holds, FLOPs, collectives, a lower bound of time.

All numbers are of one chip.
"""

import math
import re
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax

from sfv_jax.performance import hlo
from sfv_jax.performance.programs import Program
from sfv_jax.performance.targets import Target
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import on_mesh

GIB = 2**30
FLASH = re.compile(r"fmha|splash|flash", re.IGNORECASE)
_TOO_LARGE = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.IGNORECASE),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)


@dataclass
class Cost:
    """Of one program on one chip; bytes, seconds.

    Attributes:
      memory: bytes by what they hold: parts of the arguments, "outputs" (what does not replace an argument),
        "temporaries", "code", "padding" (arguments as the chip lays them out, less their plain size).
      needed: their sum; where the compiler refused, what it says it needs. `limit`: what the chip has.
      peak: the compiler's own peak, None where it tells none.
      model_flops: matrix products and convolutions of the model, recomputation and padding left out.
      flops, bytes: of the compiled kernels. `compiler_flops`, `compiler_bytes`: XLA's own count, loops counted once.
      kernels: how often each custom kernel runs; `flash` of them are fused attention.
      roofline: seconds, every kernel at the peak of what limits it. `exchange`: seconds of collectives at link speed.
      compiler_seconds: the compiler's own estimate (TPU), loops counted once.
    """

    name: str
    fits: bool
    needed: float
    limit: float
    memory: dict[str, float]
    alias: float = 0.0
    peak: float | None = None
    model_flops: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    compiler_flops: float | None = None
    compiler_bytes: float | None = None
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    flash: float = 0.0
    uncounted: float = 0.0
    roofline: float = 0.0
    exchange: float = 0.0
    compiler_seconds: float | None = None
    unknown_loops: int = 0
    compile_seconds: float = 0.0
    refused: str = ""

    @property
    def seconds(self) -> float:
        """Lower bound of the time: kernels and collectives one after the other, each at its limit."""
        return self.roofline + self.exchange


def shard_bytes(abstract) -> float:
    """Bytes of one device's parts of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def measure(program: Program, target: Target, mesh: jax.sharding.Mesh, limit: float, keep: Path | None = None) -> Cost:
    """Compiles `program` for `target` on `mesh` and reads what it costs.

    A program whose arguments alone exceed `limit` bytes is not compiled. The text of a compiled one is written into the
    folder `keep`.
    """
    memory = argument_memory(program)
    if (state := sum(memory.values())) > limit:
        return Cost(program.name, False, state, limit, memory, refused="the arguments alone do not fit")
    began = time.monotonic()
    lowered = on_mesh(mesh, lambda: program.function.lower(*program.args))()
    try:
        with ThreadPoolExecutor(1) as beside:  # tracing once more takes half a minute, compiling keeps one core busy
            model_flops = beside.submit(count_flops, program.plain, *program.args)
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        others = sum(shard_bytes(tree) for tree in program.resident.values())
        cost = Cost(program.name, False, needed + others, limit, memory, refused="the compiler ran out of memory")
        cost.compile_seconds = time.monotonic() - began
        return cost
    seconds = time.monotonic() - began
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{program.name.replace(' ', '_')}.hlo").write_text(compiled.as_text())
    cost = read(program, compiled, target, mesh.size, limit)
    cost.compile_seconds, cost.model_flops = seconds, model_flops.result() / mesh.size
    return cost


def argument_memory(program: Program) -> dict[str, float]:
    """Bytes on one chip of what a program is given, by what it is, and of what lies beside it."""
    memory = {name: shard_bytes(tree) for name, tree in (program.parts | program.resident).items()}
    return {name: size for name, size in memory.items() if size}


def read(program: Program, compiled, target: Target, devices: int, limit: float) -> Cost:
    """What a compiled `program` costs on one of `devices` chips that offer `limit` bytes each."""
    cost = _account(program, compiled, argument_memory(program), limit)
    _read_kernels(cost, compiled, target, devices)
    return cost


def _needed(message: str) -> float | None:
    """Bytes that a compiler which ran out of memory says it needs; None if it failed for another reason."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * 1024 ** (" KMGT".index(found[2].upper()))
    return math.inf if "RESOURCE_EXHAUSTED" in message else None


def _account(program: Program, compiled, memory: dict, limit: float) -> Cost:
    stats = compiled.memory_analysis()
    plain = sum(shard_bytes(tree) for tree in program.parts.values())
    memory = memory | {
        # Arguments that the program does not use are dropped by the compiler; they lie in memory all the same.
        "padding": max(stats.argument_size_in_bytes - plain, 0.0),
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    memory = {name: size for name, size in memory.items() if size > 0}
    needed = sum(memory.values())
    cost = Cost(program.name, needed <= limit, needed, limit, memory, alias=stats.alias_size_in_bytes)
    cost.peak = getattr(stats, "peak_memory_in_bytes", 0) or None
    return cost


def _read_kernels(cost: Cost, compiled, target: Target, devices: int) -> None:
    program = hlo.parse(compiled.as_text())
    chip, kernels = target.chip, hlo.kernels(program)
    cost.flops = sum(k.flops * k.times for k in kernels)
    cost.bytes = sum(k.bytes * k.times for k in kernels)
    cost.roofline = sum(max(k.flops / chip.flops, k.bytes / chip.bandwidth) * k.times for k in kernels)
    for kernel in kernels:
        if kernel.target:
            cost.kernels[kernel.target] = cost.kernels.get(kernel.target, 0) + kernel.times
        if kernel.target and FLASH.search(kernel.target + kernel.op.name + kernel.op.attributes[:2000]):
            cost.flash += kernel.times
            cost.uncounted += 0 if kernel.flops else kernel.times
    cost.collectives = hlo.collectives(program, devices)
    cost.exchange = sum(kind["bytes"] for kind in cost.collectives.values()) / target.link
    cost.unknown_loops = program.unknown_loops
    analysis = compiled.cost_analysis() or {}
    cost.compiler_flops, cost.compiler_bytes = analysis.get("flops"), analysis.get("bytes accessed")
    estimate = analysis.get("optimal_seconds")
    if estimate is not None:  # an operation of unknown cost subtracts a second
        cost.compiler_seconds = estimate + max(math.ceil(-estimate), 0)


def planner_rss() -> float:
    """The most memory this process has used, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)

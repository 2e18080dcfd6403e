"""Cost of one compiled program on a target: memory by content, FLOPs, collectives, a lower bound of the time.

All numbers are per chip.
"""

import math
import re
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
    """Cost of one program on one chip, in bytes and seconds.

    Attributes:
      memory: bytes by content: parts of the arguments, "outputs" (those that replace no argument), "temporaries",
        "code", "padding" (the arguments in the chip's layout, less their plain size).
      needed: sum of `memory`; if the compiler refused, the bytes that it reported instead.
      limit: bytes available on the chip.
      alias: bytes of the outputs that replace donated arguments.
      peak: the compiler's own peak; None if not reported.
      model_flops: matrix products and convolutions of the model, without recomputation and padding.
      flops, bytes: FLOPs and memory traffic of the compiled kernels.
      compiler_flops, compiler_bytes: XLA's own counts, with every loop counted once.
      collectives: as `hlo.collectives` returns them.
      kernels: number of calls of each custom kernel; `flash` of these calls are fused attention, and `uncounted` of
        those have unknown FLOPs.
      roofline: seconds of all kernels, each at the peak FLOP/s or bandwidth, whichever is slower.
      exchange: seconds of the collectives at link speed.
      compiler_seconds: the compiler's own estimate (TPU only), with every loop counted once.
      unknown_loops: loops of unknown length, counted once.
      refused: reason why the program was not compiled; empty if it was.
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
    """Returns the bytes that abstract arrays with shardings have on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def measure(program: Program, target: Target, mesh: jax.sharding.Mesh, limit: float, keep: Path | None = None) -> Cost:
    """Compiles `program` for `target` on `mesh` and returns its cost.

    A program whose arguments alone exceed `limit` bytes is not compiled. The text of a compiled program is written to
    the folder `keep`.
    """
    memory = argument_memory(program)
    if (state := sum(memory.values())) > limit:
        return Cost(program.name, False, state, limit, memory, refused="the arguments alone do not fit")
    began = time.monotonic()
    lowered = on_mesh(mesh, lambda: program.function.lower(*program.args))()
    try:
        with ThreadPoolExecutor(1) as beside:  # tracing again takes half a minute; compiling uses one core
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
    """Returns the bytes per chip of a program's arguments and resident arrays, by content."""
    memory = {name: shard_bytes(tree) for name, tree in (program.parts | program.resident).items()}
    return {name: size for name, size in memory.items() if size}


def read(program: Program, compiled, target: Target, devices: int, limit: float) -> Cost:
    """Returns the cost of a compiled `program` on each of `devices` chips with `limit` bytes."""
    cost = _account(program, compiled, argument_memory(program), limit)
    _read_kernels(cost, compiled, target, devices)
    return cost


def _needed(message: str) -> float | None:
    """Returns the bytes that an out-of-memory message of the compiler names; None for any other message.

    The result is infinity if the message names no number.
    """
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * 1024 ** (" KMGT".index(found[2].upper()))
    return math.inf if "RESOURCE_EXHAUSTED" in message else None


def _account(program: Program, compiled, memory: dict, limit: float) -> Cost:
    stats = compiled.memory_analysis()
    plain = sum(shard_bytes(tree) for tree in program.parts.values())
    memory = memory | {
        # The compiler drops unused arguments, but they still occupy memory.
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
    if estimate is not None:  # each operation of unknown cost subtracts a second
        cost.compiler_seconds = estimate + max(math.ceil(-estimate), 0)

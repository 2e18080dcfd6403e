"""Kernels, FLOPs, bytes and collectives of a compiled program, read from its text (`compiled.as_text()`).

Bodies of loops count as often as they run. All numbers are per device, like the shapes in the text.
"""

import math
import re
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# Opcodes that move nothing: they name parts of other values, or call computations whose instructions are counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done", "copy-done", "opt-barrier"),
    *("add-dependency", "domain", "get-dimension-size", "iota"),
}
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products in the kernels of jax's flash attention for TPU
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass
class Op:
    """One instruction of a computation.

    Attributes:
      type: type of the result, as text.
      operands: names of instructions of the same computation.
      literal: text between the parentheses: the operands, the value of a constant or the number of a parameter.
      attributes: text after the parentheses.
    """

    name: str
    type: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str


@dataclass
class Kernel:
    """One executed instruction of a device.

    Attributes:
      flops, bytes: FLOPs and memory traffic of one execution.
      times: number of executions.
      target: target of a custom call, "" for any other instruction.
    """

    op: Op
    flops: float
    bytes: float
    times: float
    target: str = ""


@dataclass
class Program:
    """Compiled program.

    Attributes:
      computations: `{computation: {instruction: Op}}`.
      times: number of runs of each computation.
      fused: computations whose instructions belong to the kernel that calls them.
      unknown_loops: loops of unknown length, counted once.
    """

    computations: dict[str, dict[str, Op]]
    times: dict[str, float] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    unknown_loops: int = 0


def parse(text: str) -> Program:
    """Parses the text of an XLA module.

    Raises:
      ValueError: if it has no entry computation.
    """
    program, current, entry = Program({}), None, None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if found := _COMPUTATION.match(line):
                current = program.computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
            continue
        if op := _instruction(line):
            current[op.name] = op
    if entry is None:
        raise ValueError("this text has no ENTRY computation: give the text of a compiled XLA module")
    _count_runs(program, entry)
    return program


def _instruction(line: str) -> Op | None:
    name, separator, rest = line.strip().partition(" = ")
    if not separator:
        return None
    name = name.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    given = rest[: end - 1]
    return Op(name, type_, opcode, _NAME.findall(given), given, rest[end:])


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _count_runs(program: Program, entry: str) -> None:
    """Fills `times` and `fused`, callers before callees, so that the count of a caller is complete when it is used."""
    program.times = dict.fromkeys(program.computations, 0.0)
    program.times[entry] = 1.0
    for name in reversed(_called_first(program, entry)):
        for op in program.computations[name].values():
            called = _CALLED.findall(op.attributes)
            if branches := _BRANCHES.search(op.attributes):
                called += _NAME.findall(branches[1])
            if not called:
                continue
            times = program.times[name] * (_trips(program, op) if op.opcode == "while" else 1)
            for callee in called:
                program.times[callee] += times
            if op.opcode == "fusion" or "to_apply=" in op.attributes and op.opcode != "call":
                program.fused.update(called)
        if name in program.fused:
            for op in program.computations[name].values():
                program.fused.update(_CALLED.findall(op.attributes))


def _called_first(program: Program, entry: str) -> list[str]:
    order, seen, stack = [], set(), [(entry, False)]
    while stack:
        name, done = stack.pop()
        if done:
            order.append(name)
        elif name not in seen and name in program.computations:
            seen.add(name)
            stack.append((name, True))
            for op in program.computations[name].values():
                branches = _BRANCHES.search(op.attributes)
                called = _CALLED.findall(op.attributes) + (_NAME.findall(branches[1]) if branches else [])
                stack += [(callee, False) for callee in called]
    return order


def _trips(program: Program, op: Op) -> float:
    """Returns a loop's trip count: XLA's own, else the largest constant in the loop's condition, else 1."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes):
        return float(found[1])
    pending, bounds = [_found(r"condition=%([\w.\-]+)", op.attributes)[1]], []
    while pending:
        for inner in program.computations.get(pending.pop(), {}).values():
            pending += _CALLED.findall(inner.attributes)
            bounds += [int(inner.literal)] if inner.opcode == "constant" and inner.literal.isdigit() else []
    if not bounds or max(bounds) < 1:
        program.unknown_loops += 1
        return 1.0
    return float(max(bounds))


def arrays(type_: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns (element type, shape, layout) of every array in a type, with tuples flattened."""
    return [
        (kind, tuple(map(int, dims.split(","))) if dims else (), layout or "")
        for kind, dims, layout in _ARRAY.findall(type_)
        if kind in BITS or re.fullmatch(r"[a-z]+\d+.*", kind)
    ]


def size(type_: str, everywhere: bool = True) -> float:
    """Returns the bytes of a type; `everywhere=False` excludes arrays in a TPU's on-chip memory (`S(1)` and up)."""
    total = 0.0
    for kind, shape, layout in arrays(type_):
        bits = BITS[kind] if kind in BITS else int(_found(r"\d+", kind)[0])
        if everywhere or not re.search(r"S\([1-9]", layout):
            total += math.prod(shape) * bits / 8
    return total


def collectives(program: Program, devices: int) -> dict[str, dict[str, float]]:
    """Returns, by kind, the `count` of executed collectives and the `bytes` that one device receives in them.

    An asynchronous collective counts once, at its start. Of n devices each receives (n - 1) / n of the whole array that
    is gathered, exchanged or scattered, twice that in an all-reduce, and all of its array in a permutation.

    Args:
      program: from `parse`.
      devices: number of devices of the program, for instructions without groups.
    """
    found: dict[str, dict[str, float]] = {}
    for name, ops in program.computations.items():
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or not program.times[name]:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:  # the form of a reduce-scatter on TPUs
                kind = "reduce-scatter"
            n = _group(op.attributes, devices)
            sums = found.setdefault(kind, {"count": 0.0, "bytes": 0.0})
            sums["count"] += program.times[name]
            sums["bytes"] += _moved(kind, op, ops, n) * program.times[name]
    return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def _group(attributes: str, devices: int) -> int:
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(",")) if found[1] else devices
    return devices


def _moved(kind: str, op: Op, ops: dict[str, Op], n: int) -> float:
    given = sum(size(ops[name].type) for name in op.operands if name in ops)
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    if kind == "all-gather":
        return given * (n - 1)
    return given * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def kernels(program: Program) -> list[Kernel]:
    """Returns the kernels that a device executes, without collectives and `FREE` instructions; a fusion is one."""
    found = []
    for name, ops in program.computations.items():
        times = program.times[name]
        if not times or name in program.fused:
            continue
        for op in ops.values():
            if op.opcode in FREE or op.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
                continue
            target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
            target = target[1] if target else ""
            found.append(Kernel(op, _flops(program, op, ops), _traffic(program, op, ops), times, target))
    return found


def _traffic(program: Program, op: Op, ops: dict[str, Op]) -> float:
    """Returns the bytes that an instruction reads and writes in device memory.

    Of an array that is only sliced or updated in place, only the slice or the update counts.
    """
    written, read = size(op.type, everywhere=False), 0.0
    inner = program.computations[_found(_CALLED, op.attributes)[1]] if op.opcode == "fusion" else {}
    parameters = {int(o.literal): o for o in inner.values() if o.opcode == "parameter"}
    for n, name in enumerate(op.operands):
        if name not in ops:
            continue
        whole = size(ops[name].type, everywhere=False)
        users = [o for o in inner.values() if n in parameters and parameters[n].name in o.operands]
        if whole and users and all(o.opcode in ("dynamic-slice", "slice", "gather") for o in users):
            whole = min(whole, sum(size(o.type) for o in users))
        elif whole and users and all(_updates(o, parameters[n].name) for o in users):
            update = sum(size(inner[o.operands[1]].type) for o in users)
            whole, written = 0.0, min(written, written - whole + update)
        read += whole
    if op.opcode == "dynamic-update-slice":
        return 2 * size(ops[op.operands[1]].type)
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    return read + written


def _updates(op: Op, name: str) -> bool:
    return op.opcode == "dynamic-update-slice" and op.operands[0] == name


def _flops(program: Program, op: Op, ops: dict[str, Op]) -> float:
    """Returns the FLOPs of matrix products, convolutions and fused attention; a multiply-add counts as two."""
    if op.opcode == "fusion":
        inner = program.computations[_found(_CALLED, op.attributes)[1]]
        return sum(_flops(program, o, inner) for o in inner.values())
    shapes = [arrays(ops[name].type)[0][1] if name in ops and arrays(ops[name].type) else () for name in op.operands]
    result = arrays(op.type)[0][1] if arrays(op.type) else ()
    if op.opcode == "dot":
        contracted = _dims(op.attributes, r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(result) * math.prod(shapes[0][d] for d in contracted)
    if op.opcode == "convolution":
        return _convolution(op.attributes, shapes[0], shapes[1], result)
    if op.opcode != "custom-call":
        return 0.0
    if "__cublas" in op.attributes:
        contracted = _found(r'lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)[1]
        return 2.0 * math.prod(result) * math.prod(shapes[0][int(d)] for d in re.findall(r"\d+", contracted))
    if "__cudnn$conv" in op.attributes:
        roles = (shapes[0], shapes[1], result)
        if "BackwardInput" in op.attributes:
            roles = (result, shapes[1], shapes[0])
        elif "BackwardFilter" in op.attributes:
            roles = (shapes[0], result, shapes[1])
        return _convolution(op.attributes, *roles)
    if "fmha" in op.attributes:  # q, k: [n, s, heads, d]; forward has two products, backward five
        (n, s, heads, d), keys = shapes[0], shapes[1][1]
        return (10.0 if "Backward" in op.attributes else 4.0) * n * s * keys * heads * d
    if "tpu_custom_call" in op.attributes and (found := _SPLASH.search(op.name)):
        q, k = [shape for shape in shapes if len(shape) > 2 and shape[-1] == shapes[-1][-1]][:2]  # [.., s, d]
        return 2.0 * SPLASH_PRODUCTS[found[1]] * math.prod(q) * k[-2]
    return 0.0


def _found(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """Returns the first match of a pattern that XLA's format guarantees."""
    found = re.search(pattern, text)
    assert found is not None, f"unknown HLO format: no {pattern!r} in {text[:200]!r}"
    return found


def _dims(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _convolution(attributes: str, x: tuple, kernel: tuple, out: tuple) -> float:
    """Returns 2 x outputs x inputs per output, without positions in the padding or between dilated samples."""
    labels = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = re.search(r"window=\{([^}]*)\}", attributes)
    spatial = [c for c in labels[2] if c.isdigit()]
    setting = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2.0 * kernel[labels[2].index("i")]
    for label, n in zip(labels[3], out, strict=False):
        flops *= n if label in "bf" else 1
    for k, axis in enumerate(spatial):
        get = lambda name, default, k=k: setting.get(name, "x".join([default] * len(spatial))).split("x")[k]  # noqa: E731
        flops *= _positions(
            x[labels[1].index(axis)],
            kernel[labels[2].index(axis)],
            out[labels[3].index(axis)],
            int(get("stride", "1")),
            int(get("pad", "0_0").split("_")[0]),
            int(get("lhs_dilate", "1")),
            int(get("rhs_dilate", "1")),
        )
    return flops


def _positions(x: int, kernel: int, out: int, stride: int, pad: int, spread: int, dilation: int) -> int:
    """Returns the number of (output, kernel) positions along one axis that meet a sample of the input."""
    last = (x - 1) * spread
    total = 0
    for j in range(kernel):
        first = j * dilation - pad  # input position of output 0
        hits = [i for i in range(out) if 0 <= first + i * stride <= last]
        total += sum((first + i * stride) % spread == 0 for i in hits) if spread > 1 else len(hits)
    return total

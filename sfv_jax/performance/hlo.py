"""What a compiled program does, read from its text (`compiled.as_text()`): kernels, FLOPs, bytes, collectives.

Bodies of loops count as often as they run. Shapes in the text are those of one device, so are all numbers here.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# They move nothing: names for parts of other values, or what is counted where it is called.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done", "copy-done", "opt-barrier"),
    *("add-dependency", "domain", "get-dimension-size", "iota"),
}
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products per score in jax's flash attention for TPU
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass
class Op:
    """One instruction: `type` is its result's, `operands` are names in its computation, `literal` is what else stands
    between the brackets (the value of a constant, the number of a parameter), `attributes` what follows them."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str


@dataclass
class Kernel:
    """One executed instruction of a device: what it computes, what it moves, how often."""

    op: Op
    flops: float
    bytes: float
    times: float
    target: str = ""


@dataclass
class Program:
    """Computations by name, each a dict of instructions by name, and how often each computation runs."""

    computations: dict[str, dict[str, Op]]
    times: dict[str, float] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    unknown_loops: int = 0


def parse(text: str) -> Program:
    """The program behind the text of an XLA module.

    Raises:
      ValueError: if there is no entry computation.
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
        raise ValueError("this text holds no ENTRY computation: give the text of a compiled XLA module")
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
    """Index behind the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _count_runs(program: Program, entry: str) -> None:
    """Fills `times`: callers come after what they call in the text, so it is walked backwards from the entry."""
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
    """How often a loop runs: as XLA noted it, else the largest number its condition compares with, else 1."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes):
        return float(found[1])
    condition = re.search(r"condition=%([\w.\-]+)", op.attributes)
    pending, bounds = [condition[1]], []
    while pending:
        for inner in program.computations.get(pending.pop(), {}).values():
            pending += _CALLED.findall(inner.attributes)
            bounds += [int(inner.literal)] if inner.opcode == "constant" and inner.literal.isdigit() else []
    if not bounds or max(bounds) < 1:
        program.unknown_loops += 1
        return 1.0
    return float(max(bounds))


def arrays(type_: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(element type, shape, layout) of every array in a type, tuples flattened."""
    return [
        (kind, tuple(map(int, dims.split(","))) if dims else (), layout or "")
        for kind, dims, layout in _ARRAY.findall(type_)
        if kind in BITS or re.fullmatch(r"[a-z]+\d+.*", kind)
    ]


def size(type_: str, everywhere: bool = True) -> float:
    """Bytes of a type; `everywhere=False` leaves out what lies in a TPU's on-chip memory (`S(1)` and up)."""
    total = 0.0
    for kind, shape, layout in arrays(type_):
        bits = BITS.get(kind) if kind in BITS else int(re.search(r"\d+", kind)[0])
        if everywhere or not re.search(r"S\([1-9]", layout):
            total += math.prod(shape) * bits / 8
    return total


def collectives(program: Program, devices: int) -> dict[str, dict[str, float]]:
    """Per kind: `count` of executed collectives and `bytes` that one device receives in them.

    Asynchronous ones count once, at their start. Of n devices, each receives (n - 1) / n of what is gathered,
    exchanged or, with the sizes before it, scattered; twice that of what is reduced for all; all of what is permuted.

    Args:
      devices: of the whole program, where an instruction names no groups.
    """
    found: dict[str, Counter] = {}
    for name, ops in program.computations.items():
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or not program.times[name]:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:  # how TPUs spell it
                kind = "reduce-scatter"
            n = _group(op.attributes, devices)
            moved = _moved(kind, op, ops, n)
            found.setdefault(kind, Counter()).update(count=program.times[name], bytes=moved * program.times[name])
    return {kind: dict(found[kind]) for kind in COLLECTIVES if kind in found}


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
    """What a device executes, collectives and free instructions left out; a fusion is one kernel."""
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
    """Bytes an instruction reads and writes in device memory; of what it only slices or updates in place, the part."""
    written, read = size(op.type, everywhere=False), 0.0
    inner = program.computations[_CALLED.search(op.attributes)[1]] if op.opcode == "fusion" else {}
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
    """FLOPs of matrix products, convolutions and fused attention in an instruction, a multiply-add being two."""
    if op.opcode == "fusion":
        inner = program.computations[_CALLED.search(op.attributes)[1]]
        return sum(_flops(program, o, inner) for o in inner.values())
    shapes = [arrays(ops[name].type)[0][1] if name in ops and arrays(ops[name].type) else () for name in op.operands]
    result = arrays(op.type)[0][1] if arrays(op.type) else ()
    if op.opcode == "dot":
        contracted = _dims(op.attributes, r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(result) * math.prod(shapes[0][d] for d in contracted)
    if op.opcode == "convolution":
        return _convolution(op.attributes, *shapes[:2], result)
    if op.opcode != "custom-call":
        return 0.0
    if "__cublas" in op.attributes:
        contracted = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
        return 2.0 * math.prod(result) * math.prod(shapes[0][int(d)] for d in re.findall(r"\d+", contracted[1]))
    if "__cudnn$conv" in op.attributes:
        roles = (*shapes[:2], result)
        if "BackwardInput" in op.attributes:
            roles = (result, shapes[1], shapes[0])
        elif "BackwardFilter" in op.attributes:
            roles = (shapes[0], result, shapes[1])
        return _convolution(op.attributes, *roles)
    if "fmha" in op.attributes:  # q, k as [n, s, heads, d]; forward two products, backward five
        (n, s, heads, d), keys = shapes[0], shapes[1][1]
        return (10.0 if "Backward" in op.attributes else 4.0) * n * s * keys * heads * d
    if "tpu_custom_call" in op.attributes and (found := _SPLASH.search(op.name)):
        q, k = [shape for shape in shapes if len(shape) > 2 and shape[-1] == shapes[-1][-1]][:2]  # [.., s, d]
        return 2.0 * SPLASH_PRODUCTS[found[1]] * math.prod(q) * k[-2]
    return 0.0


def _dims(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _convolution(attributes: str, x: tuple, kernel: tuple, out: tuple) -> float:
    """2 x output x inputs per output; positions that fall into padding or between dilated samples do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
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
    """Pairs of output and kernel positions along one axis that meet a sample of the input."""
    last = (x - 1) * spread
    total = 0
    for j in range(kernel):
        first = j * dilation - pad  # the position met by output 0
        hits = [i for i in range(out) if 0 <= first + i * stride <= last]
        total += sum((first + i * stride) % spread == 0 for i in hits) if spread > 1 else len(hits)
    return total

"""Facts about devices: peak FLOP/s by kind, memory; and FLOPs of a function, counted on its jaxpr."""

import math
from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from sfv_jax.runtime.platforms import physical_memory

# Dense bf16 (V100: fp16) FLOP/s of one device from the vendors' data sheets, by a substring of JAX's `device_kind`; the
# first match applies.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of a device; None if it is not in `PEAK_FLOPS`."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name.lower() in device_kind.lower()), None)


def count_flops(function: Callable, *args) -> float:
    """Counts the FLOPs of the matrix products and convolutions of one call, on its jaxpr: nothing is compiled or run.

    A multiply-add counts as two. The body of a scan counts once per iteration; of the branches of a condition the
    largest counts. Left out are what no result depends on, as compilers do, elementwise operations, and the inside of
    custom calls (fused attention), so pass a function without such calls.

    Args:
      function: the function.
      *args: its arguments, arrays or `jax.ShapeDtypeStruct`.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _flops(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
            total += 2 * out.size * kernel.size / kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        elif eqn.primitive.name == "cond":
            total += max(_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            total += eqn.params.get("length", 1) * sum(map(_flops, _inner(eqn.params))) if _inner(eqn.params) else 0
    return total


def _inner(params: dict) -> list:
    values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [
        v.jaxpr if isinstance(v, core.ClosedJaxpr) else v
        for v in values
        if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))
    ]


def peak_memory() -> dict[str, float]:
    """Returns `memory/peak_gib`, the largest peak of all local devices; empty if they do not report it, as on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"memory/peak_gib": max(peaks) / 2**30} if peaks else {}


def memory_per_device() -> float | None:
    """Returns the bytes that arrays may take on each local device; CPU devices share the machine's. None: unknown."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        memory = physical_memory()
        return None if memory is None else memory / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")

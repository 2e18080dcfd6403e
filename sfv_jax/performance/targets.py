"""Targets: accelerators for which a machine without accelerators can compile programs.

A target has a name: `v5e:4x4` (a TPU slice; `v5e:4x4*2` for two slices), `h200:8` (GPUs, in hosts of 8), `cpu:8` (fake
devices of this machine). libtpu and JAX's CUDA plugin compile from descriptions of absent chips.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from sfv_jax.errors import UserError

GB, GIB = 1e9, 2**30


class TargetError(UserError):
    """Unusable target; the message lists usable ones or names the remedy."""


@dataclass(frozen=True)
class Chip:
    """Properties of one chip of a kind.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      memory: bytes available to a program: HBM less the part that the runtime reserves.
      flops: peak dense bf16 FLOP/s.
      bandwidth: bytes/s of the memory.
      link: bytes/s received from neighbors; TPU: along one axis of the torus, GPU: over NVLink.
      network: bytes/s received from another host (GPU) or slice (TPU).
      axes: dimensions of a TPU slice; 0 for other chips.
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    axes: int = 0


# TPU: Cloud TPU documentation, pages "TPU v4", "v5e", "v5p", "v6e". `link` is the one-way interconnect bandwidth per
# chip given there (2400, 1600, 4800 Gbit/s; v6e: half of 800 GB/s) over the axes of the torus. `memory` is libtpu's
# limit.
# GPU: NVIDIA data sheets (A100 80GB SXM, H100 SXM, H200 SXM); NVLink per direction; one 200 or 400 Gbit/s port each.
# Memory, clocks and limits of GPUs as in openxla/xla's target descriptions; training requests 0.92 of the memory.
CHIPS = {
    "v4": Chip("tpu", 30.75 * GIB, 275e12, 1228 * GB, 100 * GB, 6.25 * GB, 3),
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 819 * GB, 100 * GB, 3.1 * GB, 2),
    "v5p": Chip("tpu", 95.74 * GIB, 459e12, 2765 * GB, 200 * GB, 6.25 * GB, 3),
    "v6e": Chip("tpu", 31.25 * GIB, 918e12, 1638 * GB, 200 * GB, 12.5 * GB, 2),
    "a100-80": Chip("gpu", 0.92 * 85100068864, 312e12, 2039.04 * GB, 300 * GB, 25 * GB),
    "h100": Chip("gpu", 0.92 * 84942979072, 989e12, 3352.32 * GB, 450 * GB, 50 * GB),
    "h200": Chip("gpu", 0.92 * 151397597184, 989e12, 4800 * GB, 450 * GB, 50 * GB),
    "cpu": Chip("cpu", 0, 0.2e12, 20 * GB, 20 * GB, 20 * GB),  # for checks only; speed of about two cores with AVX-512
}
GPUS_PER_HOST, MOST_GPUS, MOST_TPUS, MOST_CPUS = 8, 64, 256, 64
_AMPERE = dict(name="NVIDIA A100-SXM4-80GB", cores=108, fpus=64, shared=163, l2=40, clock=1.41, capability=8)
_HOPPER = dict(cores=132, fpus=128, shared=227, l2=50, clock=1.98, capability=9)
GPU_MODELS: dict[str, dict[str, Any]] = {
    "a100-80": _AMPERE | dict(memory=85100068864),
    "h100": _HOPPER | dict(name="NVIDIA H100 80GB HBM3", memory=84942979072),
    "h200": _HOPPER | dict(name="NVIDIA H200 141GB HBM3e", memory=151397597184),
}
PLUGINS = {  # platform: (required modules, extra of this package that installs them)
    "tpu": (("libtpu",), "plan-tpu"),
    "gpu": (("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cudnn"), "plan-gpu"),
    "cpu": ((), ""),
}


@dataclass(frozen=True)
class Target:
    """Set of `count` chips of one kind; `shape` is the shape of each TPU slice, () for other chips."""

    name: str
    kind: str
    count: int
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Properties of one of the chips."""
        return CHIPS[self.kind]

    @property
    def link(self) -> float:
        """Bytes/s that a chip receives in collectives over all chips, at the slowest link."""
        crosses = self.slices > 1 or (self.chip.platform == "gpu" and self.count > GPUS_PER_HOST)
        return self.chip.network if crosses else self.chip.link


def known() -> str:
    """Returns a description of all target names."""
    tpus = ", ".join(k for k, chip in CHIPS.items() if chip.platform == "tpu")
    gpus = ", ".join(k for k, chip in CHIPS.items() if chip.platform == "gpu")
    return (
        f"TPU slices {tpus} with their shape (v5e:4x4, v5p:2x2x4; v5e:16x16*2 for two slices), "
        f"GPUs {gpus} with their number (h200:8), or cpu:N"
    )


def parse(name: str) -> Target:
    """Returns the target with this `name`.

    Raises:
      TargetError: if there is none; the message lists the names.
    """
    kind, _, rest = name.partition(":")
    if kind not in CHIPS:
        raise TargetError(f"target {name!r} is unknown: choose {known()}")
    chip = CHIPS[kind]
    if chip.platform != "tpu":
        most = MOST_GPUS if chip.platform == "gpu" else MOST_CPUS
        if not re.fullmatch(r"\d+", rest or "1") or not 1 <= int(rest or 1) <= most:
            raise TargetError(f"target {name!r}: write {kind}:N with N from 1 to {most}")
        count = int(rest or 1)
        if chip.platform == "gpu" and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise TargetError(f"target {name!r}: more than {GPUS_PER_HOST} GPUs come in hosts of {GPUS_PER_HOST}")
        return Target(name, kind, count)
    example = "4x4" if chip.axes == 2 else "2x2x4"
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?:\*(\d+))?", rest)
    shape = tuple(map(int, found[1].split("x"))) if found else ()
    slices = int(found[2] or 1) if found else 1
    count = math.prod(shape) * slices
    if len(shape) != chip.axes or not 1 <= count <= MOST_TPUS:
        raise TargetError(
            f"target {name!r}: a {kind} slice has a shape of {chip.axes} numbers, e.g. {kind}:{example}, "
            f"and at most {MOST_TPUS} chips altogether"
        )
    return Target(name, kind, count, shape, slices)


def prepare(target: Target) -> None:
    """Prepares this process to compile for `target`; to be called before JAX creates any array.

    Raises:
      TargetError: if the plugin is not installed; the message gives the command that installs it.
    """
    modules, extra = PLUGINS[target.chip.platform]
    missing = [module for module in modules if not _installed(module)]
    if missing:
        raise TargetError(
            f"target {target.name!r} needs {', '.join(missing)}, not installed here: pip install -e '.[{extra}]'"
        )
    # Otherwise libtpu queries a metadata server, warns that this is no TPU host, and rejects a second process.
    host = dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-1")
    host["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in host.items() if target.chip.platform == "tpu" else ():
        os.environ.setdefault(name, value)
    if target.chip.platform == "gpu":
        # Without a device there is no autotuning, which Triton's matrix products need for their tiles: cuBLAS instead.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
    jax.config.update("jax_platforms", "cpu")
    if target.chip.platform != "cpu":
        jax.config.update("jax_enable_compilation_cache", False)  # these programs cannot run here
    else:
        with contextlib.suppress(RuntimeError):  # JAX has started already; `devices` checks their number
            jax.config.update("jax_num_cpu_devices", target.count)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def devices(target: Target) -> list:
    """Returns descriptions of the chips of `target` (on CPU: fake devices), in the order of `jax.devices()`.

    Raises:
      TargetError: if libtpu has no such slice, or this process too few CPU devices.
    """
    platform = target.chip.platform
    options: dict[str, Any]
    if platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.count:
            raise TargetError(f"target {target.name!r}: this process has {len(found)} CPU devices")
        return found[: target.count]
    from jax.experimental import topologies

    if platform == "gpu":
        hosts = max(target.count // GPUS_PER_HOST, 1)
        options = dict(
            target_config=gpu_description(target.kind), topology=f"1x{hosts}x{min(target.count, GPUS_PER_HOST)}"
        )
        described = topologies.get_topology_desc(platform="cuda", topology_name=target.kind, **options)
        return list(described.devices)
    options = {"num_slices": target.slices} if target.slices > 1 else {}
    if math.prod(target.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if target.kind == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on Cloud TPU
    try:
        name = f"{target.kind}:{'x'.join(map(str, target.shape))}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # libtpu raises XlaRuntimeError, RuntimeError or ValueError
        reason = str(error).splitlines()[0][:200]
        text = f"target {target.name!r} is not a slice that libtpu supports ({reason}): choose {known()}"
        raise TargetError(text) from None


def gpu_description(kind: str) -> str:
    """Returns XLA's description (GpuTargetConfigProto, as text) of a GPU of `GPU_MODELS`."""
    model = GPU_MODELS[kind]
    info = dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        shared_memory_per_block=49152,
        shared_memory_per_core=(model["shared"] + 1) * 1024,
        shared_memory_per_block_optin=model["shared"] * 1024,
        threads_per_core_limit=2048,
        core_count=model["cores"],
        fpus_per_core=model["fpus"],
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=65535,
        block_dim_limit_z=65535,
        thread_dim_limit_x=1024,
        thread_dim_limit_y=1024,
        thread_dim_limit_z=64,
        registers_per_core_limit=65536,
        registers_per_block_limit=65536,
        memory_bandwidth=int(CHIPS[kind].bandwidth),
        device_memory_size=model["memory"],
        l2_cache_size=model["l2"] * 2**20,
        clock_rate_ghz=model["clock"],
        dnn_version='"9.10.0"',
    )
    major = model["capability"]
    feature = "NONE" if major == 8 else "ACCELERATED_FEATURES"
    return (
        "gpu_device_info { "
        + " ".join(f"{field}: {value}" for field, value in info.items())
        + f" cuda_compute_capability {{ major: {major} feature_extension: {feature} }} }}"
        + f' platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{model["name"]}"'
    )


def versions(target: Target) -> dict[str, str]:
    """Returns the versions of the packages that compile for `target`."""
    names = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "nvidia-cudnn-cu13"), "cpu": ()}[target.chip.platform]
    return {name: importlib.metadata.version(name) for name in ("jax", *names)}

"""Settings of the compiler for commands: effort, the cache of compiled programs, and memory kept between calls."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from sfv_jax.runtime.platforms import open_to_others

# XLA's levels and the efforts from -1 to 1 that they replaced (jax 0.11.1 removed the options for these). XLA
# describes both alike (openxla.org/xla/effort_levels; xla/service/hlo_module_config.h): O0 and -1 compile soonest, O1
# and -0.5 compile faster than production, O2 and 0 are for production, O3 and positive efforts turn on what is costly
# or experimental. libtpu 0.0.42.1 compiles a UNet to one program at -1 and O0, to one at -0.5 and O1, and to one at
# 0, 1, O2 and O3. "UNKNOWN" is JAX's default: on TPU it compiles as O2 does; on GPU as O0 does, without the passes
# for collectives and loops that O1 turns on.
EFFORTS = {"O0": -1.0, "O1": -0.5, "UNKNOWN": 0.0, "O2": 0.0, "O3": 1.0}


def set_up(effort: float | None = None, memory_effort: float | None = None, *, runs: bool = True) -> None:
    """Prepares a command to compile: sets the compiler's effort and the cache of compiled programs.

    A command that `runs` the programs also keeps its memory (`keep_memory`).

    Args:
      effort: effort for fast programs, from -1 to 1 (see `EFFORTS`); None leaves JAX's configuration as it is.
      memory_effort: the same for programs that need less memory.
      runs: whether the command runs what it compiles.

    The cache is `cache_folder()`, or what JAX_COMPILATION_CACHE_DIR names; JAX_ENABLE_COMPILATION_CACHE=false turns it
    off. A folder that cannot be written, or that others can, is reported on stderr and costs nothing but the
    compilation.
    """
    if runs:
        keep_memory()
    # At effort 0 both options return to JAX's defaults, which differ.
    for name, value, default in (
        ("jax_optimization_level", effort, "UNKNOWN"),
        ("jax_memory_fitting_level", memory_effort, "O2"),
    ):
        if value is not None:
            jax.config.update(name, _level(value) or default)
    if not _config("jax_enable_compilation_cache"):
        return
    replace_garbage()
    if _config("jax_compilation_cache_dir"):
        return
    folder = cache_folder()
    if problem := _open(folder):
        print(f"{problem}: compiled programs are not kept; see JAX_COMPILATION_CACHE_DIR", file=sys.stderr)
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _open(folder: Path) -> str:
    """Creates the folder of compiled programs; returns why it cannot be used, "" if it can.

    JAX runs what it finds there, so nobody else may write it or the two folders above, which are its own.
    """
    try:
        for part in (folder.parents[1], folder.parent, folder):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := open_to_others(part):
                return reason
        return "" if os.access(folder, os.W_OK) else f"cannot write {folder}"
    except OSError:
        return f"cannot write {folder}"


def replace_garbage() -> None:
    """Makes JAX remove an entry of its cache that it cannot read, such as half of one, which a killed process left.

    JAX compiles such a program again at every start, because it never writes an entry that exists.
    """
    from jax._src import compilation_cache  # nothing public has the key of an entry

    read = getattr(compilation_cache, "get_executable_and_time", None)
    if read is None or hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def read_or_remove(key: str, *args, **kw):
        try:
            return read(key, *args, **kw)
        except Exception:  # of any kind; JAX warns and compiles
            with contextlib.suppress(OSError):
                Path(_config("jax_compilation_cache_dir"), f"{key}-cache").unlink()
            raise

    compilation_cache.get_executable_and_time = read_or_remove


def _config(name: str) -> Any:
    """Returns `jax.config.NAME`, whose type is declared only from jax 0.11 on."""
    return getattr(jax.config, name)


def _level(effort: float) -> str | None:
    """Returns the level of an effort: the nearest one if negative, O3 if positive, None for 0, the default."""
    if effort == 0:
        return None
    return "O3" if effort > 0 else "O1" if effort > -0.75 else "O0"


def current_effort() -> float:
    """Returns the effort for fast programs that JAX's configuration has: -1, -0.5, 0 or 1."""
    return EFFORTS[_config("jax_optimization_level")]


MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of glibc's mallopt


def keep_memory() -> None:
    """Makes a process on a Linux CPU keep the memory that it frees; elsewhere it does nothing.

    Call it before JAX has made a device. XLA allocates the temporary memory of a program at every call. By default
    glibc takes large pieces from the system and returns them at once, so each of their pages is cleared again: a fifth
    of the time of a mid-size UNet's gradient. Here glibc uses its heap for them instead. The heaps of other threads
    cannot grow, so programs run in the thread that calls them; the CPU has nothing else to do meanwhile.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if _has_accelerator() or not hasattr(libc, "mallopt"):  # glibc's alone
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)


def _has_accelerator() -> bool:
    """Returns whether JAX may find an accelerator; does not start JAX, since processes of one run must meet first."""
    if platforms := _config("jax_platforms"):
        return platforms != "cpu"
    return any(find_spec(module) for module in ("libtpu", "jax_plugins"))


def cache_folder() -> Path:
    """Returns `sfv_jax/compiled/MACHINE` in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    JAX's key covers jaxlib, accelerator and options but not the CPU: a program compiled for one CPU may use
    instructions that another one with the same home lacks. So each kind of CPU has its own folder.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    features = hashlib.sha256(_cpu().encode()).hexdigest()[:8]
    return home / "sfv_jax" / "compiled" / f"{platform.machine()}-{features}"


def _cpu() -> str:
    """Returns the kernel's list of the instruction sets of this CPU; where there is none, the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())

"""What the operating systems do differently, in one place. Linux is tested; macOS and Windows have these fallbacks."""

import ctypes
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path


def is_alive(process: int) -> bool:
    """Returns whether a process with this number exists on this machine."""
    if os.name != "posix":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; a number that no process has
        return process < 2**31
    return True


def place() -> str:
    """Returns what processes that see each other's numbers have in common: containers may share a name or a kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive_on_windows(process: int) -> bool:
    """Asks for the exit code: `os.kill(process, 0)` would end the process."""
    query, denied, running = 0x1000, 5, 259  # PROCESS_QUERY_LIMITED_INFORMATION, ERROR_ACCESS_DENIED, STILL_ACTIVE
    kernel = ctypes.windll.kernel32  # pyrefly: ignore[missing-attribute]
    handle = kernel.OpenProcess(query, False, process)
    if not handle:
        return kernel.GetLastError() == denied
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == running


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that leads a session (`start_new_session`) and all that it started; on Windows only itself."""
    if os.name != "posix":
        process.kill()
        return
    import signal

    os.killpg(process.pid, signal.SIGKILL)


def open_to_others(folder: Path) -> str:
    """Returns why other users could put files into a folder; "" if they cannot, and on Windows."""
    if os.name != "posix":
        return ""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    return f"everybody can write {folder} (chmod 700 it)" if found.st_mode & stat.S_IWOTH else ""


def peak_memory() -> float | None:
    """Returns the peak memory of this process in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def physical_memory() -> int | None:
    """Returns the bytes of memory of this machine; None on Windows."""
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

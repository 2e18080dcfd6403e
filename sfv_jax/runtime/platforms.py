"""What the operating systems do differently, in one place. Linux is tested; macOS and Windows have these fallbacks."""

import os
import subprocess
import sys


def is_alive(process: int) -> bool:
    """Returns whether a process with this number exists on this machine; True on Windows.

    On POSIX systems signal 0 only asks. On Windows `os.kill` ends the process, or sends Ctrl-C to its whole console.
    """
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that leads a session (`start_new_session`) and all that it started; on Windows only itself."""
    if os.name != "posix":
        process.kill()
        return
    import signal

    os.killpg(process.pid, signal.SIGKILL)


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

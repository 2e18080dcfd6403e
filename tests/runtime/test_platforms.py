"""Platforms without some functions of POSIX: nothing is killed, and what they do not report is None."""

import ast
import builtins
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sfv_jax.reproduction import jobs
from sfv_jax.runtime import compilation, device, locks, platforms, stopping

PACKAGE = Path(platforms.__file__).parents[1]
# Modules and functions of `os` and `signal` that Windows lacks or that do something else there.
POSIX = {"fcntl", "grp", "pwd", "pty", "resource", "termios", "kill", "killpg", "fork", "getpgid", "setsid", "sysconf"}
POSIX |= {"SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "alarm", "geteuid", "getuid", "statvfs", "mkfifo", "symlink_to"}
POSIX |= {"symlink", "sched_getaffinity", "sched_setaffinity", "getrusage"}


@pytest.fixture
def windows(monkeypatch):
    """Makes `platforms` see Windows; `os.kill` fails the test."""

    def fail(*args):
        raise AssertionError("os.kill ends a process on Windows")

    class Os:
        """`os` as on Windows: pathlib needs the real one."""

        name, sysconf_names = "nt", {}
        kill = staticmethod(fail)

    monkeypatch.setattr(platforms, "os", Os)
    real = builtins.__import__

    def without_resource(name, *args, **kw):
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without_resource)


def test_on_posix_a_process_is_asked():
    assert platforms.is_alive(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not platforms.is_alive(process.pid)
    assert not platforms.is_alive(10**30)
    assert platforms.peak_memory() > 2**20 and platforms.physical_memory() > 2**28


def test_on_windows_a_process_is_looked_up(windows, monkeypatch):

    class Kernel(types.SimpleNamespace):
        OpenProcess = staticmethod(lambda query, inherit, process: {7: 1, 8: 2}.get(process, 0))
        GetLastError = staticmethod(lambda: 87)
        CloseHandle = staticmethod(lambda handle: None)

        @staticmethod
        def GetExitCodeProcess(handle, code):
            code._obj.value = 259 if handle == 1 else 0

    monkeypatch.setattr(platforms.ctypes, "windll", types.SimpleNamespace(kernel32=Kernel()), raising=False)
    assert [platforms.is_alive(n) for n in (7, 8, 9)] == [True, False, False]


def test_on_windows_memory_is_unknown(windows):
    assert platforms.peak_memory() is None and platforms.physical_memory() is None
    assert device.memory_per_device() is None


def test_on_windows_only_the_process_itself_is_ended(windows):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        platforms.end_group(process)
    finally:
        process.kill()
    assert process.wait() != 0


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_c_library_is_left_alone_elsewhere(monkeypatch, platform):
    def load(name):
        raise AssertionError("only glibc has mallopt")

    monkeypatch.setattr(compilation.sys, "platform", platform)
    monkeypatch.setattr(compilation.ctypes, "CDLL", load)
    compilation.keep_memory()


def test_memory_is_in_bytes_on_macos(monkeypatch):
    linux = platforms.peak_memory()
    monkeypatch.setattr(platforms.sys, "platform", "darwin")
    assert platforms.peak_memory() < linux / 500


def test_functions_of_posix_stay_in_one_module():
    """`reproduction/jobs.py` asks for the affinity only where there is one; `stopping` signals its own process."""
    allowed = {"runtime/platforms.py": POSIX, "runtime/stopping.py": {"kill"}}
    allowed["reproduction/jobs.py"] = {"sched_getaffinity", "sched_setaffinity"}
    for file in PACKAGE.rglob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "signal")
            ):
                used.add(node.attr)
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
        name = file.relative_to(PACKAGE).as_posix()
        assert not used & POSIX - allowed.get(name, set()), name


def test_without_proc_processes_are_told_apart_by_host_and_number(monkeypatch, tmp_path):
    """As on macOS and Windows."""
    read_text = Path.read_text

    def no_proc(path, *args, **options):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory")
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", no_proc)
    with locks.Lock(tmp_path / "lock.json", "runs/a"):
        owner = json.loads((tmp_path / "lock.json").read_text())
        assert owner["place"] == owner["host"] and owner["started"] == ""
        with pytest.raises(locks.LockError, match="runs/a is in use by"), locks.Lock(tmp_path / "lock.json", "runs/a"):
            pass
    assert not list(tmp_path.iterdir()) and isinstance(compilation._cpu(), str)


def test_without_hangups_and_affinity(monkeypatch):
    """As on Windows, and on macOS, which has hangups."""
    monkeypatch.delattr(stopping.signal, "SIGHUP")
    with stopping.StopRequest() as request:
        assert set(request.previous) == {stopping.signal.SIGINT, stopping.signal.SIGTERM}
    monkeypatch.delattr(jobs.os, "sched_getaffinity", raising=False)
    assert jobs.cores() == [] and jobs.default_jobs("world") >= 1

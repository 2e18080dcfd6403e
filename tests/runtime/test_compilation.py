"""The cache of compiled programs that commands use without being told."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from sfv_jax.runtime import compilation

COMMAND = """
import jax
from absl import flags
from sfv_jax.runtime import commands, compilation

def main():
    compilation.set_up(flags.FLAGS.compile_effort, flags.FLAGS.compile_memory_effort)
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
    jax.jit(lambda x: jax.numpy.sort(x) @ x)(jax.numpy.arange(9.0))
    print(jax.config.jax_compilation_cache_dir, any(hits), compilation.current_effort())

commands.run(main, commands.define_compiler_flags)
"""


def command(home: Path, *arguments: str, **variables: str) -> list[str]:
    """What a command with the user's cache folder `home` says: its cache, whether that had the program, its effort."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env |= {"XDG_CACHE_HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    run = subprocess.run([sys.executable, "-c", COMMAND, *arguments], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.slow
def test_a_second_start_finds_its_programs(tmp_path):
    folder, hit, effort = command(tmp_path)
    assert Path(folder).parent == tmp_path / "sfv_jax" / "compiled" and (hit, effort) == ("False", "0.0")
    assert command(tmp_path) == [folder, "True", "0.0"]
    assert command(tmp_path, "--compile_effort=-1") == [folder, "False", "-1.0"]  # another program
    assert command(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ["None", "False", "0.0"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:100], lambda content: b"garbage"])
def test_an_entry_that_cannot_be_read_is_replaced(tmp_path, damage):
    folder = Path(command(tmp_path)[0])
    for entry in folder.glob("*-cache"):
        entry.write_bytes(damage(entry.read_bytes()))
    assert command(tmp_path)[1] == "False"  # compiled, and written anew
    assert command(tmp_path)[1] == "True"


KEEP = """
import resource, sys, jax
from sfv_jax.runtime import compilation

if sys.argv[1:]:
    compilation.keep_memory()
call = jax.jit(lambda x: jax.numpy.cumsum(x[::-1]) + x)
x = jax.block_until_ready(jax.numpy.ones(2**24))
for n in range(6):
    if n == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(call(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_of_a_call_is_kept_for_the_next():
    """Four calls, each of 64 MiB and more: 130,000 pages taken anew without it, 17,000 at most with it."""
    command = [sys.executable, "-c", KEEP, "keep"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000


@pytest.mark.parametrize(
    ("platforms", "installed", "kept"),
    [("", "", True), ("cpu", "libtpu", True), ("", "libtpu", False), ("", "jax_plugins", False), ("tpu", "", False)],
)
def test_only_where_there_is_no_accelerator(config, monkeypatch, platforms, installed, kept):
    calls = []
    libc = SimpleNamespace(mallopt=lambda *args: calls.append(args))
    monkeypatch.setattr(compilation, "find_spec", lambda name: name == installed)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(compilation.sys, "platform", "linux")
    config["jax_platforms"] = platforms
    compilation.keep_memory()
    assert calls == ([(-4, 0), (-1, -1)] if kept else [])
    assert config.get("jax_cpu_enable_async_dispatch", True) is not kept


@pytest.fixture
def config(monkeypatch):
    """jax.config without a cache; what is set is forgotten."""

    class Config(dict):
        __getattr__ = dict.__getitem__

    config = Config(jax_compilation_cache_dir=None, jax_enable_compilation_cache=True, jax_platforms="tpu")
    config.update = lambda name, value: config.__setitem__(name, value)
    monkeypatch.setattr(jax, "config", config)
    return config


def test_a_cache_that_was_named_stays(config):
    config["jax_compilation_cache_dir"] = "mine"
    compilation.set_up(memory_effort=0.5)
    assert config.jax_compilation_cache_dir == "mine" and config.jax_memory_fitting_level == "O3"
    assert "jax_optimization_level" not in config


@pytest.mark.parametrize(
    ("effort", "level", "back"),
    [
        (-1, "O0", -1),
        (-0.8, "O0", -1),
        (-0.5, "O1", -0.5),
        (-0.1, "O1", -0.5),
        (0, None, 0),
        (0.2, "O3", 1),
        (1, "O3", 1),
    ],
)
def test_an_effort_is_one_of_the_levels_that_xla_has(config, effort, level, back):
    config.update("jax_compilation_cache_dir", "mine")
    compilation.set_up(effort, effort, runs=False)
    assert (config.jax_optimization_level, config.jax_memory_fitting_level) == (level or "UNKNOWN", level or "O2")
    assert compilation.current_effort() == back


def test_the_levels_and_their_defaults_are_those_of_jax():
    """At effort 0 the levels are JAX's own defaults, so that a command without flags shares its programs."""
    code = """
import jax
from sfv_jax.runtime import compilation
print(jax.config.jax_optimization_level, jax.config.jax_memory_fitting_level)
for level in compilation.EFFORTS:
    jax.config.update("jax_optimization_level", level)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UNKNOWN", "O2"]


def test_no_cache_where_it_cannot_be_written(config, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation.set_up()
    assert config.jax_compilation_cache_dir is None
    assert "compiled programs are not kept" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="file modes")
def test_only_a_private_cache_is_used(config, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.set_up(runs=False)
    folder = compilation.cache_folder()
    assert config.jax_compilation_cache_dir == str(folder)
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.parents[:2])] == [0o700] * 3
    for path, problem in ((folder, "chmod"), (folder.parent, "chmod"), (folder, "user")):
        config["jax_compilation_cache_dir"] = None
        with monkeypatch.context() as patch:
            if problem == "user":
                patch.setattr(os, "getuid", lambda: 12345)
            else:
                path.chmod(0o777)
            compilation.set_up(runs=False)
        path.chmod(0o700)
        error = capsys.readouterr().err
        assert config.jax_compilation_cache_dir is None and error.count("\n") == 1
        expected = f"everybody can write {path} (chmod 700 it)" if problem == "chmod" else "belongs to another user"
        assert expected in error and "compiled programs are not kept" in error


def test_each_kind_of_cpu_has_its_own_folder(monkeypatch):
    folders = set()
    for features in ("flags : avx2", "flags : avx2 avx512f"):
        monkeypatch.setattr(compilation, "_cpu", lambda features=features: features)
        folders.add(compilation.cache_folder())
    assert len(folders) == 2

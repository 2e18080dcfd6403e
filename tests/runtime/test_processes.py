"""Two processes on loopback with four devices each, compared with one with eight; continuation on fewer of both."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from sfv_jax.checkpoints.base import load_generator
from sfv_jax.runtime import processes, sharding
from sfv_jax.runtime.processes import ProcessError, join
from sfv_jax.training import loop
from tests.support import small_run

ROOT = Path(__file__).parents[2]
# The first steps of SM3 move parameters by 0.016. Its state consists of normalized gradients of up to 30.
# The last layer compiles in a third of the time of all; tests/runtime/test_sharding.py trains all on every mesh.
TRAINED = "conv_out"
BOUNDS = {"generator": 2e-5, "ema": 2e-5, "opt_g": 1e-3, "step": 0}


def begin(workdir: Path, *flags: str) -> subprocess.Popen:
    """Starts to train in two processes of four devices each."""
    environment = os.environ | dict(
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
        LOGS=str(workdir.parent),
        JAX_DEFAULT_MATMUL_PRECISION="highest",
    )
    arguments = ["--config", str(ROOT / "tests/support/small_run.py"), "--workdir", str(workdir), *flags]
    command = [str(ROOT / "launch/local.sh"), "-n", "2", "-d", "4", "--", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def launch(workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    """Trains in two processes of four devices each."""
    with begin(workdir, *flags) as started:
        out, error = started.communicate(timeout=600)
    return subprocess.CompletedProcess(started.args, started.returncode, out, error)


def run(workdir: Path, devices: int, steps: int, **mesh) -> dict:
    """Trains in this process on the first `devices`; returns the last state."""
    config = small_run.get_config()
    config.update(dict(steps=steps, mesh=mesh, sample_every=0, checkpoint_every=steps, trainable=TRAINED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:devices]))
        return jax.device_get(loop.train(config, workdir))


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/denoising"] for line in lines}


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys() == BOUNDS.keys()
    for name, bound in BOUNDS.items():
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=bound), found[name], expected[name])


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> tuple[Path, dict]:
    """Returns the workdir and the state after four steps in one process on eight devices."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    return workdir, run(workdir, 8, 4, fsdp=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Returns the workdir of two processes after two steps."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    done = launch(workdir, "--config.steps=2", "--config.mesh.fsdp=2", f"--config.trainable={TRAINED}")
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.mark.slow
def test_two_processes_do_what_one_does(eight, two):
    found, expected = losses(two), losses(eight[0])
    assert found.keys() == {1, 2}
    np.testing.assert_allclose([found[n] for n in (1, 2)], [expected[n] for n in (1, 2)], rtol=1e-5)
    assert (two / "samples/0000002.png").stat().st_size > 0
    assert len(list((two / "tensorboard").glob("events*"))) == 1  # process 0 alone writes


@pytest.mark.slow
def test_two_processes_continue_as_four_devices_and_those_as_one(eight, two, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    assert load_generator(workdir).step == 2
    assert int(run(workdir, 4, 3, data=1, fsdp=2, spatial=2)["step"]) == 3
    assert_close(run(workdir, 1, 4), eight[1])
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(eight[0]).values()), rtol=1e-5)


def members(workdir: Path) -> dict[int, int]:
    """Returns `{process id of the run: process number of the system}` of the processes that train in `workdir`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            if str(workdir) in words and words[-2].startswith("--process_id="):
                found[int(words[-2].partition("=")[2])] = int(entry.parent.name)
    return found


def until(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_two_processes_are_told_to_stop_and_one_is_killed(tmp_path):
    workdir = tmp_path / "run"
    quick = (f"--config.trainable={TRAINED}", "--config.sample_every=0", "--config.mesh.fsdp=2")
    start = partial(begin, workdir, "--config.steps=100000", "--config.checkpoint_every=1000", *quick)
    with start() as launched:
        until(lambda: (workdir / "metrics.jsonl").exists() and losses(workdir))
        os.kill(members(workdir)[1], signal.SIGHUP)  # one alone
        out, _ = launched.communicate(timeout=100)
    assert launched.returncode == 0 and not members(workdir)
    step = int(re.search(r"saved step (\d+); run the same", out)[1])
    assert (workdir / "checkpoints" / str(step)).is_dir() and not (workdir / "lock.json").exists()
    with start() as launched:
        until(lambda: max(losses(workdir)) > step)
        os.kill(members(workdir)[1], signal.SIGKILL)
        began = time.monotonic()
        launched.communicate(timeout=60)
    assert time.monotonic() - began < 20 and launched.returncode and not members(workdir)


def test_processes_stop_together():
    """Three processes without training: the action of the first fails, then the second has other settings."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "import sys\nfrom sfv_jax.runtime.processes import ProcessError, agree, join, once\nnumber = int(sys.argv[1])\n"
        f"join({address!r}, 3, number)\nagree({{'seed': 0, 'note': 'x' * 5000}})\n"
        "once(lambda: None)\ntry:\n  once(lambda: {}['workdir'])\n"
        "except (KeyError, ProcessError) as error:\n  print(repr(error))\n"
        "try:\n  agree({'seed': 0, 'batch_size': 8 * (2 if number == 1 else 1), 'extra': (1, 2)})\n"
        "except ProcessError as error:\n  print(error)"
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen([*command, str(n)], env=environment, stdout=subprocess.PIPE, text=True) for n in range(3)
    ]
    # Gloo prints other lines before these.
    first, second, third = (process.communicate(timeout=120)[0].splitlines()[-2:] for process in started)
    assert first[0] == "KeyError('workdir')"
    assert second[0] == third[0] == "ProcessError(\"process 0 stopped: KeyError: 'workdir'\")"
    assert first[1] == third[1] == "started with other settings than process 0: process 1"
    assert second[1] == "this process was started with other settings than process 0: batch_size=16 here, 8 there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "--num_processes and --process_id need --coordinator"),
        (("localhost:1", None, 0), "needs --num_processes and --process_id"),
        (("localhost:1", 2, 2), "--process_id=2 is not one of 2"),
        (("localhost", 2, 0), "has no port"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(ProcessError, match=message):
        join(*arguments)


def test_which_environments_are_clusters():
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}
    assert processes.in_cluster(step) and not processes.in_cluster(step | {"SLURM_STEP_NUM_TASKS": "1"})
    assert processes.in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not processes.in_cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) and not processes.in_cluster({})


@pytest.mark.slow
def test_many_sharded_arrays_are_fingerprinted_on_fake_devices():
    """Programs with collectives that are all in flight would block each other's threads until XLA gives up."""
    code = (
        "import jax, numpy as np\nfrom sfv_jax.checkpoints import checksums\nfrom sfv_jax.runtime import sharding\n"
        "checksums.SMALL = -1  # devices read all\n"
        "place = jax.NamedSharding(sharding.make_mesh(4, 2, 1), jax.P('fsdp'))\n"
        "arrays = [jax.device_put(np.ones((64 + 2 * (i % 20), 8), np.float32), place) for i in range(400)]\n"
        "add = jax.jit(lambda arrays: [x + 1e-9 * jax.numpy.sum(x) for x in arrays])\n"
        "for _ in range(4):\n  arrays = add(arrays)\n  print(len(checksums.fingerprints(arrays)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["400"] * 4, done.stderr[-1000:]

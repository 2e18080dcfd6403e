"""Signals: acknowledged at once, then ignored until the state is saved; a second Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfv_jax.runtime.stopping import StopRequest

ROOT = Path(__file__).parents[2]
# A computation without Python instructions, as a compilation is, and one second after it.
BUSY = """
import hashlib, sys, time
from sfv_jax.runtime.platforms import is_alive
from sfv_jax.runtime.stopping import StopRequest
with StopRequest(lambda: "the checkpoint of step 8 is intact") as stop:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", int(sys.argv[1]))
    print("compiled", stop.asked(1), stop.before(), flush=True)
    time.sleep(1)
print("left", flush=True)
"""


def busy(rounds: int = 1_000_000) -> subprocess.Popen:
    """Starts `BUSY`; a million rounds take about a second."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(rounds)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_acknowledged_while_compiling_and_the_next_change_nothing(number):
    with busy() as process:
        process.send_signal(number)
        assert process.stderr.readline().startswith(f"{number.name}: stopping after the current step, then saving")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "compiled True True\n"  # acknowledged before
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "left\n" and process.stderr.read() == ""
    assert process.returncode == 0


def test_a_second_ctrl_c_ends_at_once_and_names_what_is_saved():
    with busy(100_000_000) as process:
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again ends at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)  # one that a launcher passed on
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "Ctrl-C again: ended at once; the checkpoint of step 8 is intact\n"
        assert process.stdout.read() == ""
    assert process.returncode == 130


# A command that computes without Python instructions, with a process of its own.
COMMAND = """
import hashlib, subprocess, sys
from sfv_jax.runtime import commands, stopping

def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
    stopping.CHILDREN.append(child)
    print("begun", flush=True)
    try:
        hashlib.pbkdf2_hmac("sha512", b"", b"", rounds)
    finally:
        print("cleaned", flush=True)
        child.kill()
        child.wait()

sys.argv[0] = "paint.py"
rounds = int(sys.argv.pop())
commands.run(main, lambda: None)
"""


@pytest.mark.parametrize("rounds", [1_000_000, 1_000_000_000])
def test_every_command_answers_ctrl_c_at_once_and_leaves_no_process(rounds):
    """A computation of a second ends and is cleaned up after; one of minutes is ended by the second Ctrl-C."""
    program = [sys.executable, "-c", COMMAND, str(rounds)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline() for _ in range(2)} == {"begun\n", "up\n"}
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("SIGINT: stopping as soon as the current computation ends")
        if rounds > 1_000_000:
            time.sleep(0.7)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == "Ctrl-C again: ended at once\n" and process.stdout.read() == ""
        else:
            assert process.stdout.read() == "cleaned\n"
            assert process.stderr.read() == "paint: interrupted; what is finished stays\n"
    assert process.returncode == 130  # and the child is gone: it had the same pipe, which has ended


def test_handlers_are_restored_and_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked(2)
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)

"""Common behavior of all commands: exit codes, one line for errors the user can correct, and values of enum flags."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from sfv_jax import choices
from sfv_jax.checkpoints import exporter, importer
from sfv_jax.config_rules import RULES
from sfv_jax.data import ucf101, video, worlds
from sfv_jax.diffusion import solvers
from sfv_jax.evaluation import request
from sfv_jax.methods import METHODS, adversarial
from sfv_jax.models import attention, networks
from sfv_jax.performance import job, measurement
from sfv_jax.reproduction import experiments

COMMANDS = ("train", "sample", "convert", "prepare", "evaluate", "plan", "benchmark", "reproduce", "quickstart")
COMMAND = """
import sys
from absl import flags
from ml_collections import config_flags
from sfv_jax.errors import UserError
from sfv_jax.runtime import commands

def main():
    if flags.FLAGS.fail == "user":
        raise UserError("mend this")
    if flags.FLAGS.fail == "bug":
        raise ValueError("inside")
    return 3

sys.argv[0] = "somewhere/paint.py"
def define_flags():
    flags.DEFINE_string("fail", "", "how to end")
    config_flags.DEFINE_config_file("config", "configs/sfv.py", "a config", lock_config=True)

commands.run(main, define_flags)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, cwd=root)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 3, ""),
        (["--fail=user"], 1, "paint: mend this\n"),
        (["--config.sfv.p_maen=1"], 1, "paint: no such config field: "),
        (["--config=configs/sfv.py:huge"], 1, "paint: flag --config=configs/sfv.py:huge: "),
        (["--config=configs/none.py"], 1, "paint: Configuration is not available"),
        (["--fial=x"], 1, "paint: Unknown command line flag 'fial'. Did you mean: fail"),
        (["left", "over"], 1, "paint: flags only, but got 'left over'; see --help\n"),
    ],
)
def test_exit_codes_and_one_line(arguments, code, said):
    done = run(*arguments)
    assert done.returncode == code
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_bug_keeps_its_traceback():
    done = run("--fail=bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: inside" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_jax(name):
    """A command prints its flags with exit code 0, without imports of JAX and other large packages."""
    code = (
        f"import runpy, sys; sys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_module('sfv_jax.{name}', run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print('loaded', sorted({'jax', 'transformers', 'tensorflow_datasets', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "exit 0\nloaded []" in done.stdout, done.stdout[-300:] + done.stderr[-2000:]
    assert f"{name}.py" in done.stdout


def test_names_to_choose_from_are_those_there_are():
    assert {*choices.DTYPES} == {*networks.DTYPES}
    assert {*choices.SAMPLERS} == {*solvers.SAMPLERS}
    assert {f".{name}" for name in choices.VIDEO_FORMATS} == {*video._WRITERS}
    assert choices.EXPORTS == (*exporter.WHAT, "taesdv")
    assert choices.STORED_DTYPES == importer.DTYPES
    assert {*choices.NETWORKS} == {*measurement.NETWORKS}
    assert {*choices.TABLES} == {*experiments.TABLES}
    assert {*choices.DATASETS} == {*request.COUNTS}
    assert choices.UCF101_SPLITS == (*ucf101.SPLITS, "all")
    assert {*choices.JOBS} == {*job.WHAT}
    assert {*choices.METHODS} == {*METHODS}
    with pytest.raises(ValueError, match="choose auto, cudnn, reduce or one of") as unknown:
        attention.attention(*[jnp.zeros((1, 2, 1, 2))] * 3, kernel="none")
    named = set(re.findall(r"\w+", str(unknown.value).partition("choose")[2])) - {"or", "one", "of"}
    assert {*choices.ATTENTION_KERNELS} == named
    assert {*RULES["sfv.gan_loss"].among} == {*adversarial.GAN_LOSSES}
    assert choices.SHAPES == worlds.SHAPES and choices.COLOURS == tuple(worlds.PALETTE)

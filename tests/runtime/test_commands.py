"""Common behavior of all commands: exit codes, one line for errors the user can correct, and values of enum flags."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest

from sfv_jax import __main__ as main
from sfv_jax import choices
from sfv_jax.checkpoints import box, exporter, importer
from sfv_jax.config_rules import RULES
from sfv_jax.data import ucf101, video, worlds
from sfv_jax.diffusion import solvers
from sfv_jax.evaluation import request
from sfv_jax.methods import METHODS, adversarial
from sfv_jax.models import attention, networks
from sfv_jax.performance import job, measurement
from sfv_jax.reproduction import experiments

COMMANDS = ("train", "sample", "convert", "prepare", "evaluate", "plan", "benchmark", "reproduce", "quickstart", "demo")
COMMAND = """
import sys
from absl import flags
from ml_collections import config_flags
from sfv_jax.errors import InterruptedWork, UserError
from sfv_jax.runtime import commands

def main():
    if flags.FLAGS.fail == "user":
        raise UserError("mend this")
    if flags.FLAGS.fail == "stopped":
        raise InterruptedWork("stopped at step 3")
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
        (["--fail=stopped"], 130, "paint: stopped at step 3\n"),
        ([], 3, ""),
        (["--fail=user"], 1, "paint: mend this\n"),
        (
            ["--config=configs/sfv.py", "--config.sfv.p_maen=1"],
            1,
            "paint: no such config field: 'p_maen'; did you mean p_mean?\n",
        ),
        (["--config=configs/sfv.py", "--config.p_mean=1"], 1, "paint: no such config field: "),
        (["--config=configs/sfv.py:huge"], 1, "paint: --config: configs/sfv.py takes "),
        (["--config=configs/none.py"], 1, "paint: --config: there is no config file configs/none.py\n"),
        (
            ["--config", "configs/svf.py"],
            1,
            "paint: --config: there is no config file configs/svf.py; did",
        ),
        (["--config=README.md"], 1, "paint: --config: README.md is no config file: give one with the suffix .py\n"),
        (
            ["--config=configs/sfv.py", "--config.seed=abc"],
            1,
            "paint: flag --config.seed=abc: not a whole number: 'abc'",
        ),
        (["--config=configs"], 1, "paint: --config: there is no config file configs\n"),
        (["--config={}/divides.py"], 1, "paint: {}/divides.py, line 2: ZeroDivisionError: division by zero\n"),
        (["--config={}/unread.py"], 1, "paint: {}/unread.py, line 1: SyntaxError: "),
        (["--config={}/empty.py"], 1, "paint: {}/empty.py: AttributeError: "),
        (["--fial=x"], 1, "paint: no flag --fial; did you mean --fail? see --help\n"),
        (["--confg.seed=1"], 1, "paint: no flag --confg.seed; did you mean --config.seed? see --help\n"),
        (["--p_mean=1"], 1, "paint: no flag --p_mean; did you mean --config.sfv.p_mean? see --help\n"),
        (["--qqq=1"], 1, "paint: no flag --qqq; see --help\n"),
        (["left", "over"], 1, "paint: flags only, but got 'left over'; see --help\n"),
    ],
)
def test_exit_codes_and_one_line(arguments, code, said, tmp_path):
    for name, text in (
        ("divides", "def get_config():\n    return 1 / 0"),
        ("unread", "def get_config(:"),
        ("empty", ""),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    done, said = run(*(argument.format(tmp_path) for argument in arguments)), said.format(tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "usage: sfv COMMAND"),
        (["--help"], 0, "usage: sfv COMMAND"),
        (["trian"], 1, "sfv: no command 'trian'; did you mean train? "),
        (["train"], 1, "train: missing: --config, --workdir; see --help\n"),
        (["train", "--help"], 0, "Trains a model.\n"),
    ],
)
def test_one_command_with_all_others(arguments, code, said):
    command = [sys.executable, "-m", "sfv_jax", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == code and (done.stderr or done.stdout).startswith(said)
    if arguments in ([], ["--help"]):
        assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == [*main.COMMANDS]


def test_every_command_is_listed_and_installed():
    assert {*main.COMMANDS} == {*COMMANDS}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"sfv": "sfv_jax.__main__:main"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_keeps_the_lines_of_its_examples(name):
    """A backslash at the end of a line of an example is no continuation of the docstring."""
    text = (Path(main.__file__).parent / f"{name}.py").read_text()
    assert max(map(len, ast.get_docstring(ast.parse(text)).splitlines())) <= 120


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


def test_what_tests_start_finds_the_bytecode_of_jax():
    """Without it, starting the commands takes a third of the time of all tests."""
    code = "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('jax').cached).exists())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_names_to_choose_from_are_those_there_are():
    assert {*choices.DTYPES} == {*networks.DTYPES}
    assert {*choices.SAMPLERS} == {*solvers.SAMPLERS}
    assert {f".{name}" for name in choices.VIDEO_FORMATS} == {*video._WRITERS}
    assert choices.EXPORTS == (*exporter.WHAT, "encoders", "taesdv")
    assert choices.PACKAGED == tuple(box.NAMES)
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

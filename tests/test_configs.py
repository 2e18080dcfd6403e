"""Config files: the numbers they show are the defaults of `sfv_jax.config`, in full and in `:tiny`."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sfv_jax import config as defaults
from sfv_jax.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs"
METHODS = ("sfv", "teacher", "animatelcm", "ufogen", "ladd")


def get_config(name: str):
    """Returns the function `get_config` of a file in `configs/`."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]


@pytest.mark.parametrize("name", METHODS)
def test_numbers_equal_the_defaults(name):
    expected = getattr(defaults, name)()
    assert get_config(name)().to_dict() == expected.to_dict()
    assert get_config(name)("tiny").to_dict() == defaults.tiny(expected).to_dict()


def test_printed_has_the_numbers_of_the_paper_alone():
    printed = defaults.printed()
    assert get_config("sfv")("printed").to_dict() == printed.to_dict()
    assert get_config("sfv")("printed,tiny").to_dict() == defaults.tiny(printed).to_dict()
    assert (printed.sfv.recon_weight, printed.sfv.recon_reduction, printed.sfv.balance) == (0.1, "video", 0.0)
    optimizers = printed.generator_optimizer, printed.heads_optimizer
    assert [(x.warmup_steps, x.delay_steps) for x in optimizers] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_written_in_the_file(name, monkeypatch):
    """With other defaults the file still returns its own steps, batch size, learning rates and method fields."""
    expected = getattr(defaults, name)()
    changed = getattr(defaults, name)()
    changed.update(steps=1, batch_size=1, accumulation_steps=7, ema_decay=0.5)
    for section in ("generator_optimizer", "heads_optimizer"):
        if section in changed:
            changed[section].update(lr=1.0)
    changed[name].update({k: v + 1 for k, v in changed[name].items() if type(v) in (int, float)})
    monkeypatch.setattr(defaults, name, lambda: changed)
    found, expected = get_config(name)().to_dict(), expected.to_dict()
    assert found[name] == expected[name]
    for key in ("steps", "batch_size", "accumulation_steps", "ema_decay", "generator_optimizer", "heads_optimizer"):
        assert found.get(key) == expected.get(key), key


@pytest.mark.parametrize("name", METHODS)
def test_configs_are_locked_and_check_their_argument(name):
    with pytest.raises(AttributeError):
        get_config(name)().batchsize = 1
    with pytest.raises(UserError, match=f"configs/{name}.py takes .*:tiny or nothing, not :huge"):
        get_config(name)("huge")


def test_configs_need_no_jax():
    """Commands read configs before they need JAX."""
    code = "import sys, runpy; [runpy.run_path(f)['get_config']('tiny') for f in sys.argv[1:]]"
    code += "; print('jax' in sys.modules)"
    files = [str(FOLDER / f"{name}.py") for name in METHODS]
    assert subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True).stdout == "False\n"

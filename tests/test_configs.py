"""Config files: the numbers they show are the defaults of `sfv_jax.config`, in full and in `:tiny`."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from sfv_jax import config as defaults
from sfv_jax.config_check import check
from sfv_jax.config_rules import RULES
from sfv_jax.errors import UserError
from sfv_jax.reproduction.runs import with_settings
from sfv_jax.runtime.plain_config import flat

FOLDER = Path(__file__).parents[1] / "configs"
METHODS = ("sfv", "teacher", "animatelcm", "ufogen", "ladd", "decoder")


def get_config(name: str):
    """Returns the function `get_config` of a file in `configs/`."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]


@pytest.mark.parametrize("name", METHODS)
def test_numbers_equal_the_defaults(name):
    expected = getattr(defaults, name)()
    assert get_config(name)().to_dict() == expected.to_dict()
    assert get_config(name)("tiny").to_dict() == defaults.tiny(expected).to_dict()


def test_the_decoder_of_the_world_is_narrow():
    config = get_config("decoder")("world")
    check(config)
    assert config.init == "world-encoders" and config.data.source == "world" and config.decoder.crop == 0
    assert len(config.decoder.block_out_channels) == len(config.decoder.layers_per_block) == 3
    with pytest.raises(UserError, match="takes :world, :tiny or nothing, not :worlds"):
        get_config("decoder")("worlds")


def test_printed_has_the_numbers_of_the_paper_alone():
    printed = defaults.printed()
    assert get_config("sfv")("printed").to_dict() == printed.to_dict()
    assert get_config("sfv")("printed,tiny").to_dict() == defaults.tiny(printed).to_dict()
    with pytest.raises(UserError, match="takes :small, :printed, .*, not :printedtiny"):
        get_config("sfv")("printedtiny")
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


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arg", ["", ":tiny"])
def test_every_field_can_be_set_by_a_flag(name, arg, monkeypatch):
    """Also those whose default is None, of which only the rule tells the type."""
    file = f"{FOLDER / name}.py{arg}"
    fields = flat(get_config(name)(arg.removeprefix(":")).to_dict())
    given = {field: RULES[field].kind(1) if value is None else value for field, value in fields.items()}
    argv = ["train", *(f"--config.{field}={value}" for field, value in given.items())]
    monkeypatch.setattr(sys, "argv", argv)
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", file, flag_values=parsed, lock_config=True)
    parsed(argv)
    assert flat(parsed.config.to_dict()) == given


def test_optional_fields_keep_their_type_and_are_none_in_records(monkeypatch):
    optional = {f for f, rule in RULES.items() if rule.other is None}
    assert optional == {"sfv.recon_c"}
    config = get_config("sfv")()
    assert json.dumps(config.to_dict()["sfv"]["recon_c"]) == "null" == json.dumps(config.sfv.recon_c)
    for text, message in (("x", "could not convert string to float: 'x'"), ("None", "could not convert")):
        monkeypatch.setattr(sys, "argv", argv := ["train", f"--config.sfv.recon_c={text}"])
        parsed = flags.FlagValues()
        config_flags.DEFINE_config_file("config", str(FOLDER / "sfv.py"), flag_values=parsed, lock_config=True)
        with pytest.raises(flags.IllegalFlagValueError, match=message):
            parsed(argv)
    changed = with_settings(lambda run, seed: get_config("sfv")(), ["sfv.recon_c=0.03"])("sfv", 0)
    assert changed.sfv.recon_c == 0.03 and config.sfv.recon_c is None
    check(changed)

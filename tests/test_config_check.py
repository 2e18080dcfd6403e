"""Check of config values: one row for every field, and every wrong value is refused before anything is loaded."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sfv_jax import config as defaults
from sfv_jax import config_records
from sfv_jax.checkpoints.run import WorkdirError, claim_workdir
from sfv_jax.config import ConfigError
from sfv_jax.config_check import WITH_HEADS, check, check_paths
from sfv_jax.config_rules import METHODS, RULES, SECTIONS
from sfv_jax.data.worlds import World
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.discriminator import DiscriminatorConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.reproduction import experiments
from sfv_jax.runtime.plain_config import flat
from sfv_jax.training.loop import recorded_config
from tests.support import configuration_page, small_run
from tests.test_configs import get_config

NAN = float("nan")
TINY = [lambda name=name: defaults.tiny(getattr(defaults, name)()) for name in METHODS]
CONFIGS = [
    *(getattr(defaults, name) for name in METHODS),
    *TINY,
    lambda: get_config("sfv")("small"),
    *(lambda arg=arg: get_config("world")(arg) for arg in ("teacher", "sfv", "quick")),
    *(lambda run=run: experiments.svd_config(run, 0, "model", "cache") for run in experiments.RUNS),
    small_run.get_config,
]


def changed(base: str = "sfv", /, **changes) -> ConfigDict:
    """Returns the tiny config of a method with changes by dotted name ("__" for a dot), of whatever type."""
    config = ConfigDict(defaults.tiny(getattr(defaults, base)()).to_dict(), type_safe=False)
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    return config


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_our_configs_are_legal(number):
    check(CONFIGS[number]())


def test_lists_may_come_from_json():
    check(ConfigDict(json.loads(json.dumps(changed().to_dict()))))


def test_every_field_has_a_row_and_every_row_a_field():
    found = {name for make in CONFIGS for name in flat(make().to_dict())}
    kinds = {"unet": UNetConfig, "autoencoder": VAEConfig, "data.world": World, "patch_codec": PatchCodec}
    for section, kind in kinds.items():
        found |= {f"{section}.{field.name}" for field in dataclasses.fields(kind)}
    found |= {f"heads_optimizer.{field}" for field in defaults.adamw(1.0)}  # any optimizer may train the heads
    # The channels of frames are not to be chosen.
    assert found - {"autoencoder.in_channels", "autoencoder.out_channels"} == RULES.keys()
    assert SECTIONS["discriminator"].keys() <= {field.name for field in dataclasses.fields(DiscriminatorConfig)}
    assert {name for name in METHODS if "gan_loss" in METHODS[name]} == set(WITH_HEADS)


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_field_takes_another_type_or_a_number_that_is_none(name):
    rule = RULES[name]
    one = rule.length is None
    for value in (NAN, math.inf, -math.inf, {}, object(), b"x", [None], [[NAN]], 1j):
        assert not rule.allows(value), value
    assert rule.allows(()) == rule.allows([]) == (rule.length is not None and rule.length[0] == 0)
    assert rule.allows(None) == (rule.other is None)
    assert rule.allows(True) == (rule.kind is bool and one)
    assert rule.allows("constant") == (rule.kind is str and one and (not rule.among or "constant" in rule.among))
    assert not rule.allows("1") or rule.kind is str
    assert not rule.allows(1.5) or rule.kind is float
    assert rule.meaning and rule.legal


WRONG = [
    ("sfv", "seed", 2**32),
    ("sfv", "seed", -1),
    ("sfv", "steps", 10**400),
    ("sfv", "patch_codec__patch", {}),
    ("sfv", "data__world__radii", {"": {}}),
    ("sfv", "steps", 0),
    ("sfv", "steps", 2**31),
    ("sfv", "steps", "many"),
    ("sfv", "steps", True),
    ("sfv", "batch_size", 0),
    ("sfv", "accumulation_steps", 0),
    ("sfv", "dtype", "float8"),
    ("sfv", "ema_decay", NAN),
    ("sfv", "ema_decay", 1.0),
    ("sfv", "ema_decay", -0.1),
    ("sfv", "init_weights", "both"),
    ("sfv", "trainable", ""),
    ("sfv", "trainable", "up_blocks["),
    ("sfv", "trainable", "a" * 2000),
    ("sfv", "trainable", None),
    ("sfv", "data__source", "video"),
    ("sfv", "data__split", "test"),
    ("sfv", "data__world_size", 0),
    ("sfv", "data__world__size", 17),
    ("sfv", "data__world__radii", (3.5, 2.5)),
    ("sfv", "data__world__shapes", ("hexagon",)),
    ("sfv", "data__world__shapes", ()),
    ("sfv", "data__world__backgrounds", ((0, 0, 256),)),
    ("sfv", "data__world__backgrounds", ()),
    ("sfv", "data__world__speeds", ()),
    ("sfv", "data__world__speeds", (NAN,)),
    ("sfv", "data__world__seed", -1),
    ("sfv", "data__world__sizes", 3),
    ("sfv", "patch_codec__scaling_factor", 0.0),
    ("sfv", "patch_codec__patch", 0),
    ("sfv", "mesh__data", 0),
    ("sfv", "mesh__data", -2),
    ("sfv", "mesh__fsdp", 0),
    ("sfv", "log_every", 0),
    ("sfv", "log_every", -5),
    ("sfv", "checkpoint_every", 0),
    ("sfv", "keep_checkpoints", 0),
    ("sfv", "keep_checkpoints", -1),
    ("sfv", "keep_every", -1),
    ("sfv", "sample_every", -1),
    ("sfv", "sample_count", 0),
    ("sfv", "profile_steps", -1),
    ("sfv", "alarms__on_alarm", "mail"),
    ("sfv", "alarms__patience", 0),
    ("sfv", "alarms__min_live", NAN),
    ("sfv", "alarms__max_gap", NAN),
    ("sfv", "alarms__max_gap", -1.0),
    ("sfv", "alarms__max_data_wait", 2.0),
    ("sfv", "method", ["sfv"]),
    ("sfv", "alarms", 3),
    ("sfv", "data", None),
    ("sfv", "unet", "svd"),
    ("sfv", "discriminator", ()),
    ("sfv", "wandb_project", 3),
    ("sfv", "generator_optimizer__lr", 0.0),
    ("sfv", "generator_optimizer__lr", -1e-5),
    ("sfv", "generator_optimizer__lr", math.inf),
    ("sfv", "generator_optimizer__lr", "1e-5"),
    ("sfv", "generator_optimizer__lr", None),
    ("sfv", "generator_optimizer__name", "lion"),
    ("sfv", "generator_optimizer__momentum", 1.0),
    ("sfv", "generator_optimizer__warmup_steps", -1),
    ("sfv", "generator_optimizer__warmup_steps", 1.5),
    ("sfv", "generator_optimizer__schedule", "step"),
    ("sfv", "generator_optimizer__schedule", "cosine"),  # decay_steps=0
    ("sfv", "generator_optimizer__clip_norm", NAN),
    ("sfv", "generator_optimizer__clip_norm", -1.0),
    ("sfv", "heads_optimizer__beta", -0.1),
    ("sfv", "discriminator__spatial_kernel", 2),
    ("sfv", "discriminator__projection_dim", 0),
    ("sfv", "discriminator__sinusoid_dim", 7),
    ("sfv", "discriminator__spatial", 1),
    ("sfv", "unet__block_out_channels", ()),
    ("sfv", "unet__block_out_channels", (32, 10**9)),
    ("sfv", "unet__block_out_channels", (32, -64)),
    ("sfv", "unet__block_out_channels", (32,)),
    ("sfv", "unet__layers_per_block", 10**6),
    ("sfv", "unet__norm_groups", 0),
    ("sfv", "unet__temporal_conv", "fft"),
    ("sfv", "unet__attention_kernel", "flash"),
    ("sfv", "unet__in_channels", 6),
    ("sfv", "unet__remat", "yes"),
    ("sfv", "sfv__generator_levels", 1),
    ("sfv", "sfv__discriminator_levels", 2),
    ("sfv", "sfv__p_mean", NAN),
    ("sfv", "sfv__p_std", 0.0),
    ("sfv", "sfv__recon_c", 0.0),
    ("sfv", "sfv__recon_reduction", "mean"),
    ("sfv", "sfv__adv_weight", -1.0),
    ("sfv", "sfv__gan_loss", "wgan"),
    ("sfv", "sfv__r1_form", "exact"),
    ("sfv", "sfv__perturbation_std", 0.0),
    ("sfv", "sfv__shared_noise", 0),
    ("sfv", "sfv__generator_every", 0),
    ("sfv", "sfv__balance", -1.0),
    ("sfv", "sfv__balance_decay", 1.0),
    ("sfv", "sfv__balance_limit", 0.5),
    ("sfv", "sfv__heads_reduction", "max"),
    ("sfv", "sfv__r1_every", 0),
    ("sfv", "sfv__probabilities", (0.5, 0.5)),
    ("sfv", "sfv__probabilities", (0.5, 0.5, 0.5)),
    ("sfv", "sfv__noise_shift", 1.0),
    ("sfv", "backbone_init", None),
    ("sfv", "alarms__min_adv_to_rec", NAN),
    ("sfv", "generator_optimizer__delay_steps", -1),
    ("sfv", "generator_optimizer__max_decay", 1.5),
    ("ladd", "ladd__probabilities", (0.5, 0.4, 0.0, 0.0)),
    ("ladd", "ladd__probabilities", (1.5, -0.5, 0.0, 0.0)),
    ("ladd", "ladd__warmup_probabilities", (0.5, 0.5)),
    ("ladd", "ladd__teacher_steps", -1),
    ("ladd", "ladd__teacher_guidance", (0.5, 0.5)),
    ("ladd", "ladd__teacher_guidance", (1.0, 2.0, 3.0)),
    ("ufogen", "ufogen__jump", 1.5),
    ("ufogen", "ufogen__levels", 1),
    ("animatelcm", "animatelcm__levels", 1),
    ("animatelcm", "animatelcm__guidance_first", ()),
    ("animatelcm", "animatelcm__sampler", "ddim"),
    ("animatelcm", "animatelcm__sample_steps", 50),
    ("teacher", "teacher__cond_drop", 0.5),
    ("teacher", "teacher__p_std", 0.0),
    ("teacher", "teacher__sample_steps", 0),
]


@pytest.mark.parametrize("method, name, value", WRONG)
def test_a_wrong_value_is_named(method, name, value):
    with pytest.raises(ConfigError) as caught:
        check(changed(method, **{name: value}))
    message = str(caught.value)
    section = name.replace("__", ".")
    accepted = (f"config.{section}=", f"config.{section.rpartition('.')[0]}: ")  # a field, or its contradictory section
    assert any(text in message for text in accepted), message
    assert message.count("\n  config.") <= 2 and "Traceback" not in message


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        check(changed(seed=-1, sfv__r1_form="exact", sfv__gan_loss="relativistic", sfv__shared_noise=False, stepps=3))
    assert str(caught.value).splitlines() == [
        "the config has 4 mistakes:",
        "  config.seed=-1: give a whole number from 0 to 4294967295",
        "  config.sfv.r1_form='exact': choose one of gradient, perturbation",
        "  config.stepps=3: no such field; did you mean steps?",
        "  config.sfv.gan_loss='relativistic': compares real and fake at one noise: set sfv.shared_noise=True",
    ]


def test_contradictions_of_several_fields():
    for method, changes, message in (
        ("sfv", dict(discriminator__spatial=False, discriminator__temporal=False), "config.discriminator: .* or both"),
        ("sfv", dict(sfv__adv_weight=0.0, sfv__recon_weight=0.0), "the generator has no loss"),
        ("sfv", dict(sfv__balance=1.0, sfv__recon_weight=0.0), "balance=1.0: needs both losses"),
        ("sfv", dict(sfv__r1_every=3, sfv__heads_every=2), "r1_every=3: give a multiple of heads_every=2"),
        ("sfv", dict(alarms__min_adv_to_rec=9.0, alarms__max_adv_to_rec=2.0), "no room below max_adv_to_rec=2"),
        ("sfv", dict(sfv__p_mean=10.0, sfv__p_std=0.01), "no mass under a lognormal law"),
        ("ladd", dict(ladd__generator_levels=3), "levels=3 are fewer than the 4 probabilities"),
        (
            "sfv",
            dict(data__world__size=18),
            "multiple of patch_codec.embed_cell=4; nearest: 16 and 20",
        ),
        ("teacher", dict(method="sfv"), "config.method='sfv': fields are missing: backbone_init, discriminator"),
        ("sfv", dict(generator_optimizer__name="adamw"), "missing: generator_optimizer.b1, generator_optimizer.b2"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(changed(method, **changes))


RECORDED = json.loads((Path(__file__).parent / "recorded" / "config_0.1.0.json").read_text())


def today(name: str) -> dict:
    method, _, tiny = name.partition(":")
    config = defaults.printed() if method == "sfv" else getattr(defaults, method)()
    return (defaults.tiny(config) if tiny else config).to_dict()


def begun(workdir: Path, config: dict) -> None:
    """Makes a workdir of a run of `config` with a checkpoint."""
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    (workdir / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", RECORDED)
def test_runs_of_version_0_1_0_continue(tmp_path, name, platform):
    """The file holds the configs that this version recorded, and stays as it is.

    What is left to the platform now stays as it was, whatever the platform.
    """
    begun(tmp_path, RECORDED[name])
    config = ConfigDict(today(name))
    settled = config_records.settled(config, platform, recorded_config(config, tmp_path)).to_dict()
    claim_workdir(tmp_path, settled, config_records.renewed)
    recorded = config_records.renewed(flat(RECORDED[name]), flat(settled))
    for field in ("dtype", "unet.temporal_conv"):
        assert flat(settled)[field] == recorded[field]


def test_the_platform_decides_once():
    """What was decided at the start stays on another platform; what is given stays as given."""
    config = defaults.sfv()
    assert config.dtype == config.unet.temporal_conv == "auto"
    for platform, dtype in (("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")):
        assert config_records.settled(config, platform).dtype == dtype
    elsewhere = flat(config_records.settled(config, "gpu").to_dict())
    assert config_records.settled(config, "cpu", elsewhere).dtype == "bfloat16"
    config.dtype = "float16"
    assert config_records.settled(config, "cpu", elsewhere).dtype == "float16"
    assert defaults.sfv().dtype == "auto"


def test_a_workdir_without_a_checkpoint_adopts_a_changed_config(tmp_path, capsys):
    old, new = today("sfv"), today("sfv") | {"batch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(old))
    claim_workdir(tmp_path, new, config_records.renewed)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 4
    said = capsys.readouterr().out
    assert "no checkpoint yet" in said and "batch_size: 32 there, 4 now" in said and said.count("\n") == 2
    begun(tmp_path, new)
    with pytest.raises(WorkdirError, match="batch_size: 4 there, 32 now"):
        claim_workdir(tmp_path, old, config_records.renewed)


def test_a_workdir_with_damaged_checkpoints_alone_adopts_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(today("sfv")))
    (tmp_path / "damaged" / "3").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="batch_size"):
        claim_workdir(tmp_path, today("sfv") | {"batch_size": 4}, config_records.renewed)


def test_fields_younger_than_a_run_do_what_was_done_before(tmp_path, capsys):
    old = today("sfv")
    del old["trainable"], old["sfv"]["heads_every"], old["data"]["any_encoders"]
    begun(tmp_path, old)
    claim_workdir(tmp_path, today("sfv"), config_records.renewed)
    assert json.loads((tmp_path / "config.json").read_text())["trainable"] == "all"
    (tmp_path / "config.json").write_text(json.dumps(old))
    changed_since = today("sfv")
    changed_since["sfv"]["heads_every"] = 2
    with pytest.raises(WorkdirError, match="sfv.heads_every: 1 there, 2 now"):
        claim_workdir(tmp_path, changed_since, config_records.renewed)
    assert not capsys.readouterr().err


def test_removed_fields_that_did_nothing_are_ignored_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(config_records.GONE, "sfv.fog", 0.0)
    old = today("sfv")
    old["sfv"]["fog"] = 0.0
    begun(tmp_path, old)
    claim_workdir(tmp_path, today("sfv"), config_records.renewed)
    assert capsys.readouterr().err == "config.sfv.fog=0.0 of the recorded run is gone: it did nothing\n"
    old["sfv"]["fog"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(WorkdirError, match=r"sfv.fog: 0.5 there, '\(absent\)' now"):
        claim_workdir(tmp_path, today("sfv"), config_records.renewed)


def test_the_page_is_up_to_date():
    """`python -m tests.support.configuration_page` writes it."""
    assert configuration_page.PAGE.read_text() == configuration_page.page()


def test_paths_that_do_not_exist_are_all_named(tmp_path):
    config = defaults.sfv()
    config.update(dict(init=str(tmp_path), backbone_init="world"))
    config.data.path = str(tmp_path)
    check_paths(config)
    config.init, config.backbone_init = str(tmp_path / "a"), "worlds"
    with pytest.raises(ConfigError, match=r"2 mistakes:\n  config.init=.*/a: there is no.*\n  config.backbone_init=wo"):
        check_paths(config)
    config.update(dict(init="", backbone_init=""))
    config.data.update(path="/nowhere", source="world")
    check_paths(config)

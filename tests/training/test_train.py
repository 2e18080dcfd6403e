"""The train loop from outside: files of a run, resuming, sharding, and refusals."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.checkpoints import model_folder as store
from sfv_jax.checkpoints.base import load_generator
from sfv_jax.checkpoints.run import Checkpoints, WorkdirError
from sfv_jax.config import ConfigError
from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.layers import kernel_init
from sfv_jax.models.networks import Networks
from sfv_jax.runtime import sharding
from sfv_jax.training import inputs, loop
from sfv_jax.training.alarms import TrainingStopped
from sfv_jax.weights.folders import WeightsError
from sfv_jax.weights.pipeline import NOISE

pytestmark = pytest.mark.usefixtures("runs_share_programs")

CONFIGS = Path(__file__).parents[2] / "configs"
CHANGES = dict(
    steps=4,
    log_every=1,
    checkpoint_every=2,
    sample_every=4,
    sample_count=2,
    data=dict(world=dict(size=12, num_frames=2, radii=(2.0, 3.0)), world_size=64),
    patch_codec=dict(patch=3, embed_cell=6),
    discriminator=dict(temporal_kernel=3, projection_dim=4, sinusoid_dim=8),
    unet=dict(
        in_channels=54,
        out_channels=27,
        block_out_channels=(16,),
        num_attention_heads=(2,),
        cross_attention_dim=12,
        addition_time_embed_dim=8,
        num_frames=2,
        norm_groups=4,
    ),
)


def get_config(name: str, arg: str = ""):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def tiny(**changes):
    config = get_config("sfv", "tiny")
    config.update(CHANGES)
    config.update(changes)
    return config


def run(config, workdir: Path, devices: int = 1, *, fail_at: int = 0, stop_at: int = 0, poison_at: int = 0) -> dict:
    """Runs `loop.train` on the first `devices`.

    The loop fails before step `fail_at`, after the checkpoint of the step before; receives SIGTERM in step `stop_at`;
    and has a NaN in the batch of step `poison_at`.
    """
    batches = 0

    def put_batch(mesh, batch):
        nonlocal batches
        batches += 1
        if batches == fail_at:
            while not (workdir / "checkpoints" / str(fail_at - 1)).exists():
                time.sleep(0.05)
            raise KeyboardInterrupt
        if batches == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if batches == poison_at:
            batch["latents"][0, 0, 0, 0] = np.nan
        return sharding.put_batch(mesh, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:devices]))
        patch.setattr(loop, "put_batch", put_batch)
        return jax.device_get(loop.train(config, workdir))


def metrics(workdir: Path) -> list[dict]:
    """Returns all lines without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """Returns the workdir and the last state of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(tiny(), workdir)


@pytest.mark.slow
def test_what_a_run_leaves(whole):
    workdir, state = whole
    assert int(state["step"]) == 4
    assert [line["step"] for line in metrics(workdir)] == [1, 2, 3, 4]
    names = {"loss/adversarial", "loss/reconstruction", "loss/hinge", "loss/r1", "balance/factor"}
    assert names <= metrics(workdir)[0].keys()
    assert float(state["balance"].weight) == pytest.approx(1 - 0.99**4, rel=1e-4)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    for name in ("samples/0000004.png", "samples/0000004.gif", "config.json", "network.json"):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "tensorboard").glob("events*"))
    base = load_generator(workdir)
    assert base.step == 4 and base.unet.block_out_channels == (16,) and base.codec.patch == 3
    jax.tree.map(np.testing.assert_array_equal, base.params, state["ema"])
    jax.tree.map(np.testing.assert_array_equal, load_generator(workdir, raw=True).params, state["generator"])


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Returns the workdir of a run that failed in its third step, with an incomplete metric line and checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), workdir, fail_at=3)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/hi')
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "3.orbax-checkpoint-tmp")
    shutil.rmtree(workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "state")
    return workdir


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(whole, killed):
    workdir, expected = whole
    state = run(tiny(), killed)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert metrics(killed) == metrics(workdir)
    assert load_generator(killed).step == 4


def without_optimizer(step, state, data):
    return step, state | {"opt_g": jax.tree.map(jax.numpy.zeros_like, state["opt_g"])}, data


def a_step_too_far(step, state, data):
    return step + 1, state, data


def counter_one_behind(step, state, data):
    return step, state | {"step": state["step"] - 1}, data


def a_batch_again(step, state, data):
    return step, state, data | {"next_index": data["next_index"] - 1}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [without_optimizer, a_step_too_far, counter_one_behind, a_batch_again])
def test_mistakes_of_resuming_show(whole, tmp_path, monkeypatch, mistake):
    """Only the comparison with an uninterrupted run shows each of these mistakes."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *arguments: mistake(*restore(*arguments)))
    state = run(tiny(sample_every=0), workdir)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(whole[1]), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_run_told_to_stop_saves_and_continues(whole, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    state = run(tiny(), tmp_path / "run", stop_at=3)
    assert int(state["step"]) == 3 and signal.getsignal(signal.SIGTERM) is handler
    assert "saved step 3; run the same command again" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, run(tiny(), tmp_path / "run"), whole[1])
    assert metrics(tmp_path / "run") == metrics(whole[0])


def array_files(checkpoint: Path) -> list[Path]:
    return [p for p in (checkpoint / "state").rglob("d/*") if p.is_file()]


def flip_a_bit(checkpoint: Path) -> None:
    """Flips one in each file of arrays: in one alone it may be a byte that nothing refers to."""
    for path in array_files(checkpoint):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    for path in array_files(checkpoint):  # which of them has the moving average is not known
        path.write_bytes(path.read_bytes()[:500])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "data" / "metadata").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose_a_file])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(whole, tmp_path, capsys, damage):
    workdir, expected = tmp_path / "run", whole[1]
    shutil.copytree(whole[0], workdir)
    damage(workdir / "checkpoints" / "4")
    if damage is cut_short:  # the others need not damage the moving average
        assert load_generator(workdir).step == 2
        assert "checkpoint 4 is damaged" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, run(tiny(), workdir), expected)
    assert "checkpoint 4 is damaged" in capsys.readouterr().err
    assert (workdir / "damaged" / "4").is_dir() and load_generator(workdir).step == 4
    assert metrics(workdir) == metrics(whole[0])


@pytest.mark.slow
def test_no_sound_checkpoint_is_an_error(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for step in (2, 4):
        flip_a_bit(workdir / "checkpoints" / str(step))
    with pytest.raises(WorkdirError, match="no sound checkpoint among steps 4, 2"):
        run(tiny(), workdir)
    assert not (workdir / "damaged").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(whole, tmp_path):
    state = {"step": whole[1]["step"], "generator": whole[1]["generator"]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.tree.map(jax.numpy.asarray, state), {})
    checkpoints.manager.wait_until_finished()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow further, as on a full disk
        with pytest.raises(WorkdirError, match="could not be written .*; the checkpoint of step 1 is intact"):
            checkpoints.save(2, jax.tree.map(lambda x: 2 * jax.numpy.asarray(x), state), {})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with closing(Checkpoints(tmp_path)) as again:
        step, found, _ = again.restore(jax.tree.map(jax.numpy.asarray, state))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_which_checkpoints_stay(tmp_path):
    with closing(Checkpoints(tmp_path, keep=2, keep_every=3)) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, {"step": jax.numpy.asarray(step)}, {})
        checkpoints.manager.wait_until_finished()
        assert checkpoints.manager.all_steps() == [3, 6, 7, 8]


@pytest.mark.slow
def test_a_bad_number_stops_the_run_and_is_never_saved(whole, tmp_path, monkeypatch):
    workdir, expected = whole
    with pytest.raises(
        TrainingStopped, match="step 3: not finite: batch/latents .and .* more.; checkpoint 2 is"
    ) as error:
        run(tiny(), tmp_path / "run", poison_at=3)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert [(e["step"], e.get("alarm")) for e in metrics(tmp_path / "run")] == [(1, None), (2, None), (3, "nan")]
    jax.tree.map(np.testing.assert_array_equal, run(tiny(), tmp_path / "run"), expected)  # the same command, healthy
    assert isinstance(error.value, UserError)  # the command ends with this line and exit code 1


@pytest.mark.slow
def test_finished_run_does_nothing_more(whole):
    workdir, expected = whole
    before = metrics(workdir)
    jax.tree.map(np.testing.assert_array_equal, run(tiny(), workdir), expected)
    assert metrics(workdir) == before


# ---- refusals ----


@pytest.mark.slow
def test_workdir_of_another_config(whole):
    config = tiny(seed=3, batch_size=16, log_every=2)  # how often to report may change
    with pytest.raises(WorkdirError) as caught:
        run(config, whole[0])
    message = str(caught.value)
    assert "batch_size: 8 there, 16 now" in message and "seed: 0 there, 3 now" in message
    assert "log_every" not in message


@pytest.mark.parametrize(("name", "arg"), [("sfv", ""), ("sfv", "tiny"), ("teacher", "tiny"), ("world", "sfv")])
def test_unknown_fields(name, arg):
    config = get_config(name, arg)
    with pytest.raises(AttributeError, match="stepps"):
        config.stepps = 3
    with pytest.raises(AttributeError, match="learning_rate"):
        config.generator_optimizer.learning_rate = 1.0


def test_unknown_variant():
    with pytest.raises(ValueError, match=":tiny or nothing, not :big"):
        get_config("sfv", "big")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(init="no/such/model"), WeightsError, "no/such/model"),
        (dict(method="gan"), ConfigError, "config.method='gan': choose one of sfv, teacher"),
        (dict(data=dict(source="latents")), ConfigError, "config.init is empty"),
        (dict(unet=dict(cross_attention_dim=13)), ConfigError, "embeddings 12 numbers, the UNet .* takes 27 and 13"),
        (dict(trainable="temporel"), ConfigError, "config: trainable 'temporel' finds no parameter"),
        (dict(sfv=dict(gan_loss="relativistic", shared_noise=False)), ConfigError, "set sfv.shared_noise=True"),
        (dict(sfv=dict(r1_form="exact")), ConfigError, "sfv.r1_form='exact': choose one of gradient, perturbation"),
        (dict(unet=dict(num_attention_heads=(3,))), ConfigError, "config.unet: 16 channels must divide by 3 heads"),
    ],
)
def test_configs_that_cannot_run(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(tiny(**changes), tmp_path / "run")


def test_networks_larger_than_the_memory_are_refused_before_they_are_made(tmp_path, monkeypatch):
    def made(*args):
        raise AssertionError("parameters were made")

    monkeypatch.setattr(Networks, "init_generator", made)
    monkeypatch.setattr(inputs, "memory_per_device", lambda: 2**30)
    config = tiny(unet=dict(block_out_channels=(4096,)))
    with pytest.raises(
        ConfigError, match=r"the UNet of config.unet has [\d,]+ numbers and takes .* GiB of each device"
    ):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.setattr(loop, "check_memory", lambda what, *_: made() if "state" in what else None)
    with pytest.raises(AssertionError):  # the state is checked too
        run(tiny(), tmp_path / "run")


def test_first_parameters_are_the_same_whether_one_program_makes_them_or_not(monkeypatch):
    """Large networks are made in parts, by one program; small ones are made whole and then spread."""

    def init(seed):
        return {"kernel": kernel_init(jax.random.key(seed), (3, 3, 32, 64)), "bias": jax.numpy.zeros(64)}

    networks = SimpleNamespace(init_generator=init, abstract={"generator": jax.eval_shape(partial(init, 0))})
    place = sharding.param_shardings(sharding.make_mesh(1, 8, 1), networks.abstract["generator"])
    spread = inputs.first_params(networks, 3, place, 8)
    monkeypatch.setattr(inputs, "FEW", 0)
    made = inputs.first_params(networks, 3, place, 8)
    assert not made["kernel"].is_fully_replicated and made["bias"].is_fully_replicated
    for name, x in init(3).items():
        assert spread[name].sharding == made[name].sharding == place[name]
        np.testing.assert_array_equal(spread[name], made[name])
        np.testing.assert_array_equal(spread[name], x)


def test_data_that_does_not_fit(tmp_path):
    config = tiny()
    config.data.world_size = 5
    with pytest.raises(
        ConfigError,
        match="config.batch_size=8: the data has 5 clips, .*; set batch_size to 5 or less",
    ):
        run(config, tmp_path / "run")


def test_a_cache_of_other_encoders(tmp_path):
    digests = {"vae/model.safetensors": "1" * 64, "vae/config.json": "3" * 64, "unet/model.safetensors": "4" * 64}
    model = {"format": "sfv_jax", "version": 1, "codec": "svd", "components": {}, "configs": {}}
    model |= {"scheduler": dict(NOISE), "source": {"sha256": digests}}
    (tmp_path / "model.json").write_text(json.dumps(model))
    base = SimpleNamespace(model=store.read_model(tmp_path))
    config = get_config("sfv")
    config.data.path = str(tmp_path)
    for made_by, refused in (("1" * 64, False), ("2" * 64, True), ("", False)):
        (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"model": made_by}}))
        with (
            pytest.raises(ConfigError, match="other encoders .2222.* than those of .*1111")
            if refused
            else nullcontext()
        ):
            inputs.check_encoders(config, base.model)
    config.data.any_encoders = True
    inputs.check_encoders(config, base.model)


@pytest.mark.slow
def test_a_training_start_reads_model_json_once(model_folder, monkeypatch):
    reads, read_json = [], store.read_json
    monkeypatch.setattr(store, "read_json", lambda path, *more: reads.append(path) or read_json(path, *more))
    monkeypatch.setattr(inputs, "encoders_of", lambda path: "of another model")
    config = configs.sfv()
    config.init = str(model_folder)
    base = inputs.load_base(config, sharding.make_mesh(1, devices=jax.devices()[:1]))
    with pytest.raises(ConfigError, match="was made with other encoders"):
        inputs.check_encoders(config, base.model)
    assert reads == [model_folder / "model.json"]


@pytest.mark.slow
def test_the_backbone_of_another_run(whole, tmp_path, monkeypatch):
    """`backbone_init` names another generator's encoder; a resumed run has it, too."""
    backbones, make_step = [], loop.jit_train_step

    def watched(*arguments):
        step = make_step(*arguments)
        return lambda state, frozen, batch: backbones.append(jax.device_get(frozen)) or step(state, frozen, batch)

    monkeypatch.setattr(loop, "jit_train_step", watched)
    theirs = jax.device_get(load_generator(whole[0]).params)
    run(tiny(steps=1, sample_every=0, backbone_init=str(whole[0])), tmp_path / "run")
    run(tiny(steps=2, sample_every=0, backbone_init=str(whole[0])), tmp_path / "run")
    assert len(backbones) == 2
    for found in backbones:
        expected = tree.subtree(theirs, found["backbone"])
        jax.tree.map(np.testing.assert_array_equal, found["backbone"], expected)
    assert not np.array_equal(theirs["conv_in"]["kernel"], whole[1]["generator"]["conv_in"]["kernel"])


@pytest.mark.slow
def test_a_backbone_of_another_shape_is_refused(whole, tmp_path):
    config = tiny(backbone_init=str(whole[0]))
    config.unet.layers_per_block = 2
    with pytest.raises(ConfigError, match="backbone_init=.* has another UNet than the generator"):
        run(config, tmp_path / "run")
    with pytest.raises(WeightsError, match="nowhere"):
        run(tiny(backbone_init="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()

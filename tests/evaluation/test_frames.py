"""Scores of frames by CLIP: CMMD against loops and repeated draws, the tower against the conditioning, the reports."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfv_jax.checkpoints.model_folder import load_codec, save_model
from sfv_jax.data.video import write_video
from sfv_jax.errors import UserError
from sfv_jax.evaluation import frames, pairs, scoring
from sfv_jax.evaluation.clips import Dataset, Reading, find_clips
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.frames import Tower
from sfv_jax.evaluation.generation import Model, Options
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.models.codec import PatchCodec

PROTOCOL = Protocol(n=0, num_frames=3, height=16, width=16, score_height=16, score_width=16)
MEANS = Extractor(lambda x: x.astype(np.float32).mean((1, 2, 3)), {"kind": "function", "function": "means"})


def colors(images: np.ndarray) -> np.ndarray:
    """Returns the mean color of each image, of length 1, in place of CLIP embeddings."""
    x = images.astype(np.float32).mean((1, 2)) + 1
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


TOWER = Tower(colors, {"kind": "colors"})


def units(*shape: int, seed: int = 0, shift: float = 0.0, together: float = 0.0) -> np.ndarray:
    """Returns vectors of length 1, `[..., t, d]`; those of a clip are alike to the degree `together` of 0..1."""
    rng = np.random.default_rng(seed)
    x = (1 - together) * rng.standard_normal(shape) + together * rng.standard_normal((*shape[:-2], 1, shape[-1]))
    x[..., 0] += shift
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def gaussian(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 10**2)))


def loops(x: np.ndarray, y: np.ndarray, paired: bool) -> float:
    """Returns CMMD term by term, without pairs of frames of one clip (or, if `paired`, of one condition)."""

    def mean(first, second, distinct: bool) -> float:
        found = [
            gaussian(a, b)
            for i, one in enumerate(first)
            for j, other in enumerate(second)
            for a in one
            for b in other
            if not (distinct and i == j)
        ]
        return sum(found) / len(found)

    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, paired))


@pytest.mark.parametrize("paired", [False, True])
def test_cmmd_is_its_definition(paired):
    x, y = units(6, 3, 5), units(6, 3, 5, seed=1, shift=1.0)
    found = frames.measure_cmmd(x, y, paired=paired)
    assert found.value == pytest.approx(loops(x, y, paired), rel=1e-9) and found.n == 6
    low, high = found.interval
    assert low < found.value < high


def test_cmmd_is_the_published_number_without_its_bias():
    """The published estimate averages over all pairs of images, of which 1/n are an image with itself."""
    n = 7
    x, y = units(n, 1, 5), units(n, 1, 5, seed=1, shift=1.0)
    mean = lambda a, b: np.mean([[gaussian(p, q) for q in b[:, 0]] for p in a[:, 0]])  # noqa: E731
    published = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    unbiased = [(n * mean(z, z) - 1) / (n - 1) for z in (x, y)]
    expected = 1000 * (sum(unbiased) - 2 * mean(x, y))
    assert frames.measure_cmmd(x, y).value == pytest.approx(expected, rel=1e-9)
    assert published > expected + 1


@pytest.mark.parametrize("n", [5, 20])
def test_cmmd_of_one_distribution_is_zero_on_average(n):
    """Frames of a clip resemble each other; were they counted as independent images, the average would be above 0."""
    draws = [
        (units(n, 3, 4, seed=2 * k, together=0.8), units(n, 3, 4, seed=2 * k + 1, together=0.8)) for k in range(300)
    ]
    values = np.array([frames.measure_cmmd(x, y, resamples=1).value for x, y in draws])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    images = [[z.reshape(-1, 1, 4) for z in pair] for pair in draws[:60]]
    assert np.mean([frames.measure_cmmd(x, y, resamples=1).value for x, y in images]) > 8 * error


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_have_the_width_of_the_scatter(paired):
    def draw(k):
        x, y = units(21, 2, 4, seed=2 * k), units(21, 2, 4, seed=2 * k + 1)
        mixed = 0.9 * x + 0.3 * y if paired else y
        mixed[..., 0] += 0.5
        return x, mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)

    values = [frames.measure_cmmd(*draw(k), paired=paired, resamples=1).value for k in range(300)]
    found = [frames.measure_cmmd(*draw(k), paired=paired, seed=k).interval for k in range(300, 330)]
    width = np.mean([high - low for low, high in found])
    low, high = np.percentile(values, [2.5, 97.5])
    assert 0.8 < width / (high - low) < 1.25


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_is_from_halves_of_both_sets(paired):
    x, y = units(7, 2, 4), units(7, 2, 4, seed=1, shift=1.0)
    rng, draws = np.random.default_rng(3), []
    for _ in range(20):
        rows = rng.permutation(7)[:3]
        others = rows if paired else rng.permutation(7)[:3]
        draws.append(loops(x[rows], y[others], paired))
    spread = (np.array(draws) - np.mean(draws)) * np.sqrt(3 / 4)
    found = frames.measure_cmmd(x, y, paired=paired, resamples=20, seed=3)
    assert np.subtract(found.interval, found.value) == pytest.approx(np.quantile(spread, [0.025, 0.975]), rel=1e-6)


def test_too_few_clips_are_refused():
    with pytest.raises(UserError, match="at least 5; got 4 and 4"):
        frames.measure_cmmd(units(4, 2, 3), units(4, 2, 3))
    with pytest.raises(UserError, match="same number of samples"):
        frames.measure_cmmd(units(6, 2, 3), units(5, 2, 3))


def test_similarity_is_the_cosine_with_the_condition():
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    pictures[0, ..., 0], pictures[1, ..., 1], pictures[2, ..., :2] = 50, 70, 9
    plain = Tower(lambda x: (y := x.mean((1, 2))) / np.linalg.norm(y, axis=-1, keepdims=True), {})
    np.testing.assert_allclose(plain.similarity(pictures, pictures[0]), [1, 0, np.sqrt(0.5)], atol=1e-6)
    summary = frames.Similarity.of(np.array([[1, 0.5, 0.3], [1, 0.7, 0.1]]))
    assert summary.curve == pytest.approx([1, 0.6, 0.2]) and summary.n == 2
    assert (summary.mean.mean, summary.mean.std) == pytest.approx((0.6, 0)) and summary.last.std == pytest.approx(0.1)


# ---- the tower ----


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tower(model_folder) -> Tower:
    return Tower.load(model_folder)


def test_images_are_embedded_as_conditions_are(tower, model_folder):
    codec = load_codec(model_folder)
    for size in ((300, 260), (40, 56)):
        image = picture(1, *size)
        small = picture(1, 32, 48)
        _, embed = codec.condition(small, None, 0.0, noise=np.zeros(small.shape, np.float32), original=image)
        expected = np.asarray(embed[0], np.float64)
        np.testing.assert_allclose(tower.embed(image)[0], expected / np.linalg.norm(expected), atol=1e-6)


def test_images_are_embedded_as_by_the_pipeline(tower, pipe):
    image = picture(300, 260)
    expected = pipe._encode_image(Image.fromarray(image), "cpu", 1, do_classifier_free_guidance=False)
    expected = expected[0, 0].double().numpy()
    np.testing.assert_allclose(tower.embed(image[None])[0], expected / np.linalg.norm(expected), atol=1e-4)


def test_clips_are_embedded_frame_by_frame(tower):
    clips = np.stack([picture(3, 24, 32, seed=k) for k in range(2)])
    rows = tower.extractor.features(clips)
    found = frames.per_frame(rows, 3)
    np.testing.assert_allclose(found[1, 2], tower.embed(clips[1, 2:])[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)


def test_records_name_the_weights(tower, params, model_folder):
    config, own = load_codec(model_folder).clip_config, params["image_encoder"]
    other = own | {"visual_projection": {"kernel": own["visual_projection"]["kernel"] + 1}}
    assert tower.about["weights"] == Tower.of(config, own).about["weights"]
    assert tower.about["weights"] != Tower.of(config, other).about["weights"]


def test_a_model_without_a_tower_is_refused(tmp_path):
    save_model(tmp_path / "m", {}, {"codec": PatchCodec()}, codec="patch")
    with pytest.raises(UserError, match="m has no CLIP tower: name a model folder converted from SVD"):
        Tower.load(tmp_path / "m")


# ---- reports ----

HEAD = "CMMD ↓ | 95 % interval | CLIP, last ↑ | CLIP, mean ↑"


def color(n: int, k: int = 0, fade: int = 0) -> np.ndarray:
    """Returns frames of one color, a different one for each `n`; the last `k` frames fade to gray by `fade`."""
    frames = np.full((3, 16, 16, 3), np.array([40 + 8 * n, 200 - 7 * n, 60]), np.float32)
    frames[3 - k :] += (120 - frames[3 - k :]) * fade / 100
    return frames.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twenty colors by three methods: a reference, one that keeps them, and one whose last frame fades."""
    root = tmp_path_factory.mktemp("colors")
    for n in range(20):
        write_video(root / f"v/kept/{n:02d}.mp4", color(n), fps=7)
        write_video(root / f"v/fading/{n:02d}.mp4", color(n, 1, 80), fps=7)
        write_video(root / f"real/{n:02d}.mp4", color(n, 1, 30), fps=7)
    return root


def embeddings(folder: Path) -> np.ndarray:
    """Returns the embeddings `[n, t, d]` of all clips, sorted."""
    return np.stack([colors(x) for _, x in Reading(3).frames(find_clips(folder))])


def test_a_folder_against_a_folder(folder, tmp_path):
    kept = tmp_path / "real.npz"
    args = (folder / "v", folder / "real", PROTOCOL, MEANS)
    report = scoring.folder_against_folder(*args, kept=kept, tower=TOWER)
    assert kept.with_name("real.clip.npz").is_file()
    assert scoring.folder_against_folder(*args, kept=kept, tower=TOWER).record == report.record
    real = embeddings(folder / "real")
    for group in ("kept", "fading"):
        x = embeddings(folder / "v" / group)
        assert report.record["cmmd"][group]["value"] == pytest.approx(loops(x, real, False), abs=1e-4)
        expected = [[float(np.dot(clip[k], clip[0])) for k in range(3)] for clip in x]
        assert report.record["similarity"][group]["curve"] == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
    assert report.record["similarity"]["fading"]["last"]["mean"] < 0.98
    assert report.record["frames"] == {"kind": "colors"}
    report.write(tmp_path)
    text, page = (tmp_path / "scores.md").read_text(), (tmp_path / "index.html").read_text()
    assert HEAD in text and "Condition: first frame of the clip itself." in text and "CMMD ↓" in report.headline
    assert (
        all(
            f"<th>{title.replace(' ↑', chr(160) + '↑').replace(' ↓', chr(160) + '↓')}</th>" in page
            for title in HEAD.split(" | ")
        )
        and "CLIP cosine with the condition" in page
    )
    assert json.loads((tmp_path / "scores.json").read_text())["cmmd"].keys() == {"kept", "fading"}
    plain = scoring.folder_against_folder(*args)
    assert "CMMD" not in plain.page() and "cmmd" not in plain.record


def test_pairs(folder):
    groups = pairs.match(folder / "v", folder / "real")
    report = pairs.folder_paired(folder / "v", folder / "real", PROTOCOL, MEANS, groups, TOWER)
    real = embeddings(folder / "real")
    for group in ("kept", "fading"):
        x, found = embeddings(folder / "v" / group), report.record["paired"][group]
        assert found["cmmd"]["value"] == pytest.approx(loops(x, real, True), abs=1e-4)
        expected = [[float(np.dot(clip[k], other[0])) for k in range(3)] for clip, other in zip(x, real, strict=True)]
        assert found["similarity"]["curve"] == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
        assert found["similarity"]["last"]["mean"] == pytest.approx(np.mean(expected, axis=0)[2], abs=1e-6)
    assert "CMMD ↓" in report.headline and "CLIP, last ↑" in report.headline
    assert "CLIP cosine with the condition" in report.page() and report.record["frames"] == {"kind": "colors"}
    assert "CMMD" not in pairs.folder_paired(folder / "v", folder / "real", PROTOCOL, MEANS, groups).page()


def test_a_checkpoint_is_compared_with_its_conditions(folder, tmp_path):
    def fading(images, *, seed, num_frames, **_):
        found = np.repeat(np.stack(images)[:, None], num_frames, axis=1).astype(np.float32)
        found[:, -1] += 0.8 * (120 - found[:, -1])
        return found.astype(np.uint8)

    calls = []
    tower = Tower(lambda x: (calls.append(len(x)), colors(x))[1], {"kind": "colors"})
    dataset, model = Dataset(find_clips(folder / "real"), "colors"), Model(fading, {"checkpoint": "fading"}, Options())
    args = (model, dataset, tmp_path, PROTOCOL, MEANS)
    report = scoring.checkpoint_on_videos(*args, extras=scoring.Extras(tower, flow=False, shown=0))
    assert report.record["cmmd"]["generated"]["n"] == 20 and "similarity" not in report.record
    assert sum(calls) == 2 * 20 * 3  # each frame once
    rows = {row["name"]: row["curves"]["clip"] for row in report.record["clips"]}
    for clip, real in Reading(3).frames(dataset.clips):
        made = colors(fading([real[0]], seed=[0], num_frames=3)[0])
        assert rows[clip.name] == pytest.approx(made @ colors(real)[0], abs=1e-6)
    assert report.record["summary"]["generated"]["clip_last"]["mean"] < 0.98
    assert "CMMD ↓" in report.headline and "Condition: first frame of the real clip." in report.page()
    scoring.checkpoint_on_videos(*args, extras=scoring.Extras(tower, flow=False, shown=0))
    assert sum(calls) == 3 * 20 * 3  # those of the generated clips are kept


def test_a_folder_alone_is_compared_with_conditions_of_any_size(folder, tmp_path):
    for n in range(20):
        Image.fromarray(color(n)[0]).resize((40 + n, 30)).save(tmp_path / f"{n:02d}.png")
    extras = scoring.Extras(TOWER, flow=False, shown=0)
    report = scoring.folder_alone(folder / "v", Reading(3), tmp_path, extras)
    summary = report.record["summary"]
    assert summary["kept"]["clip_last"]["mean"] > 0.999 and summary["fading"]["clip_last"]["mean"] < 0.98
    assert "CLIP, last ↑" in report.headline and "CLIP cosine" in report.page()

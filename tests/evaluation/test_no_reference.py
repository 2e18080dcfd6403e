"""Scores without a reference: each detects its own damage, and the command converts folders to a page."""

import base64
import io
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sfv_jax.data.video import VideoError, write_video
from sfv_jax.data.worlds import World
from sfv_jax.evaluation import appearance, clips, motion, no_reference
from sfv_jax.evaluation.report import Report, Spread, dot_plot, html_table, line_plot, text_table, ticks


def texture(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Smooth random texture with detail of many sizes: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for size in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
    return (total / 4).astype(np.uint8)


def sliding(step: int = 2, frames: int = 5) -> np.ndarray:
    """Returns a texture that moves to the left by `step` pixels a frame; the short side has 96 pixels."""
    wide = texture(96, 160)
    return np.stack([wide[:, step * n : step * n + 128] for n in range(frames)])


def blurred(frames: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in frames])


def test_flow_finds_a_known_shift_and_warping_removes_it():
    pytest.importorskip("cv2")
    scores = motion.flow_scores(sliding(2))
    assert scores["flow"] == pytest.approx(100 * 2 / 96, rel=0.1)
    assert scores["warp_error"] < 0.2 * motion.motion_energy(sliding(2)) and scores["unmatched"] < 0.1
    assert motion.flow_scores(sliding(4))["flow"] == pytest.approx(2 * scores["flow"], rel=0.15)
    unrelated = np.stack([texture(seed=n) for n in range(4)])
    assert motion.flow_scores(unrelated)["unmatched"] > 0.5


def test_frozen_videos_are_told_from_slow_ones():
    still = np.repeat(texture()[None], 6, axis=0)
    noisy = np.clip(still + np.random.default_rng(0).normal(0, 1.5, still.shape), 0, 255).astype(np.uint8)
    assert motion.is_frozen(still) and motion.is_frozen(noisy) and not motion.is_frozen(sliding(1))
    steps = np.full((3, 2, 2, 3), 10, np.uint8) * np.array([1, 0, 3], np.uint8)[:, None, None, None]
    assert motion.motion_energy(steps) == 20
    assert motion.motion_energy(still) == 0 and motion.changed_share(still) == 0
    assert not motion.is_frozen(World().clip(0)[0])


def test_detail_sees_blur_and_noise_contrast_sees_fading():
    dot = np.zeros((1, 5, 5, 3), np.uint8)
    dot[0, 2, 2] = 90
    assert appearance.sharpness(dot)[0] == pytest.approx((4 * 90 + 4 * 90) / 9, rel=1e-4)
    frames = sliding(1)
    detail = lambda x: appearance.against(appearance.sharpness, x, frames[0])  # noqa: E731
    soft = np.concatenate([frames[:2], blurred(frames[2:], 2)])
    assert np.allclose(detail(frames), 1, atol=0.1) and (detail(soft)[2:] < 0.6).all()
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    assert (detail(noisy) > 1.5).all()
    faded = (frames // 2 + 64).astype(np.uint8)
    assert appearance.against(appearance.contrast, faded, frames[0])[0] == pytest.approx(0.5, abs=0.02)
    flat = np.zeros_like(frames)
    assert np.isnan(appearance.against(appearance.sharpness, frames, flat[0])).all()


def test_psnr_and_diversity_are_what_they_say():
    frames = np.full((3, 8, 8, 3), 100, np.uint8)
    assert appearance.first_frame_psnr(frames, frames[0] + 10) == pytest.approx(20 * np.log10(255 / 10))
    assert appearance.first_frame_psnr(frames, frames[0]) == np.inf
    later = frames.copy()
    later[1:] += 12
    assert appearance.diversity(np.stack([frames, frames])) == 0
    assert appearance.diversity(np.stack([frames, later, later])) == pytest.approx(12 * 2 / 3)
    with pytest.raises(ValueError, match="two videos"):
        appearance.diversity(frames[None])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods: one moves, with two seeds of one name; one blurs with time; three files are unusable."""
    folder = tmp_path_factory.mktemp("videos")
    moving = sliding(1, 14)
    for name, frames in {
        "moving/a-seed0": moving,
        "moving/a-seed1": moving[:, :, ::-1],
        "moving/b": sliding(2, 14),
        "fading/a": np.concatenate([blurred(moving[n : n + 1], n / 3) for n in range(14)]),
        "fading/short": moving[:5],
    }.items():
        write_video(folder / f"{name}.mp4", frames)
    (folder / "fading/broken.mp4").write_bytes(b"no video")
    (folder / "moving/empty.mp4").write_bytes(b"")
    return folder


@pytest.mark.slow
def test_the_command_scores_a_folder(folder, tmp_path):
    pytest.importorskip("cv2")
    command = [sys.executable, "-m", "sfv_jax.evaluate", f"--videos={folder}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "evaluate: 3 clips could not be read and are in no score:\n  " in done.stderr
    assert all(name in done.stderr for name in ("broken.mp4", "empty.mp4", "short.mp4: too short"))
    record = json.loads((tmp_path / "out/scores.json").read_text())
    unreadable = record["reading"]["unreadable"]
    assert len(unreadable) == 3 and sum("too short: 5 of 14" in line for line in unreadable) == 1
    summary = record["summary"]
    assert summary["fading"]["detail_last"]["mean"] < 0.5 < 0.9 < summary["moving"]["detail_last"]["mean"]
    assert summary["moving"]["diversity"]["n"] == 1 and summary["moving"]["diversity"]["mean"] > 5
    assert summary["moving"]["flow"]["n"] == 3 and summary["moving"]["frozen"]["mean"] == 0
    page, text = ((tmp_path / "out" / name).read_text() for name in ("index.html", "scores.md"))
    assert page.count("data:video/mp4;base64,") == 3 and page.count("<svg") >= 4  # a and b; one seed of each
    assert not re.search(r'(src|href)="(?!data:)', page) and "url(" not in page  # nothing from elsewhere
    assert "broken.mp4" in page and "broken.mp4" in text and "| moving | 3 |" in text


def test_conditions_by_name(folder, tmp_path):
    found = [clip for clip in clips.find_clips(folder) if clip.group == "fading" and clip.name == "a"]
    write_video(tmp_path / "a.png", sliding(1, 14)[:1])
    images = clips.condition_images(tmp_path, {"a"})
    pairs = clips.Reading().frames(found)
    results = no_reference.score_clips(pairs, images=images.__getitem__, flow=False)
    scores = results.rows[0].scores
    assert scores["first_psnr"] > 30 and scores["detail_first"] == pytest.approx(1, abs=0.25)
    assert "flow" not in scores and scores["detail_last"] < 0.8 * scores["detail_first"]
    with pytest.raises(VideoError, match="no condition image for 1 clips: b"):
        clips.condition_images(tmp_path, {"a", "b"})
    Image.fromarray(texture()).save(tmp_path / "b.TIF", "TIFF")
    assert np.array_equal(clips.condition_images(tmp_path, {"a", "b"})["b"], texture())
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:99])
    (tmp_path / "b.webp").touch()
    with pytest.raises(VideoError) as caught:
        clips.condition_images(tmp_path, {"a", "b", "c", "d", "e\n"})
    wrong = ("b.TIF and .*b.webp have one name", "c.png: the file is empty", "d.jpg: ", r"for 1 clips: e\\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(re.search(*pair) for pair in zip(wrong, lines, strict=True)), lines


def test_what_cannot_be_scored(folder, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="holds no video"):
        clips.find_clips(tmp_path / "none")
    write_video(tmp_path / "twice/a.mp4", sliding())
    (tmp_path / "twice/a.avi").write_bytes(b"")
    with pytest.raises(VideoError, match="have one name"):
        clips.find_clips(tmp_path / "twice")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(motion.FlowError, match=r'pip install -e "\.\[eval\]"'):
        motion.flow_scores(sliding())


def test_pages_hold_text_as_text_and_numbers_as_numbers(tmp_path):
    report = Report("<b> & co", {"value": np.float32(2), "nothing": float("nan"), "pair": (1, 2)})
    report.table("T", ["a", "b"], [["<i>", 1234.5], ["x", float("nan")], ["y", None], ["z", 0.00123]], ["note < 1"])
    report.lines("L", {"one": [0.0, float("nan"), 2.0], "two": [1.0]}, "x", "y")
    report.write(tmp_path)
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "scores.md").read_text()
    assert "<b>" not in page and "&lt;b&gt; &amp; co" in page and "&lt;i&gt;" in page and "nan" not in page.lower()
    assert r"| \<i> | 1234 |" in text and r"# \<b> & co" in text and "| x |  |" in text and "| z | 0.00123 |" in text
    assert json.loads((tmp_path / "scores.json").read_text()) == {"value": 2.0, "nothing": None, "pair": [1, 2]}
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and ticks(-3, 12) == pytest.approx([0, 5, 10])
    assert line_plot("flat", {"one": [3.0, 3.0]}, "x", "y").count("<path") > 2


def test_the_best_of_a_column_with_an_arrow_is_marked(tmp_path):
    report = Report("T")
    columns = ["", "FVD ↓", "PSNR ↑", "share ↓", "flow"]
    rows = [
        ["a", Spread(2, 9), 30.5, 0, 1],
        ["b\n", 3, "identical", 0, 2],
        ["c", float("nan"), None, 0, 3],
    ]
    report.table("T", columns, rows)
    report.table("second", ["x ↓"], [[1], [1]])
    report.write(tmp_path)
    text, page = (tmp_path / "scores.md").read_text(), (tmp_path / "index.html").read_text()
    assert "| a | **2 (9)** | 30.5 | 0 | 1 |" in text and "| **identical** | 0 | 2 |" in text
    assert text.count("**") == 4 and page.count("<b>") == 2 and "<b>2 (9)</b>" in page  # equal columns have no best
    assert report.headline.splitlines() == [
        "      FVD ↓      PSNR ↑  share ↓  flow",
        "a    *2 (9)        30.5        0     1",
        r"b\n       3  *identical        0     2",
        "c                              0     3",
    ]


def test_a_table_wider_than_the_terminal_is_turned():
    columns, rows = ["", "FVD ↓", "PSNR ↑"], [["one", 2.0, 30.5], ["two", 3.0, None]]
    assert text_table(columns, rows, 20).splitlines() == ["     FVD ↓  PSNR ↑", "one  *2.00    30.5", "two   3.00"]
    assert text_table(columns, rows, 17).splitlines()[0] == "     FVD ↓  PSNR ↑"  # turned it would be wider
    columns, rows = ["", "FVD ↓", "PSNR ↑", "detail"], [["one", 2.0, 30.5, 1], ["two", 3.0, None, 2]]
    assert text_table(columns, rows, 20).splitlines() == [
        "          one   two",
        "FVD ↓   *2.00  3.00",
        "PSNR ↑   30.5",
        "detail      1     2",
    ]


def test_the_page_has_conditions_beside_clips_and_nothing_over_them(folder):
    found = [clip for clip in clips.find_clips(folder) if clip.name in "ab"]
    own = texture(30, 40)
    results = no_reference.score_clips(
        clips.Reading().frames(found), images=lambda name: own, flow=False, shown=("a", "b")
    )
    assert results.shown["a"][no_reference.CONDITION].shape == (1, 96, 128, 3)  # as scored
    report = Report("T")
    no_reference.add_to(report, results, clips.Reading(), "test")
    page = report.page()
    assert page.count("<img ") == 2 and page.count("<video ") == 3
    columns = re.findall(r"<th>(.*?)</th>", page.split('<table class="clips')[1])
    assert columns[1:4] == ["(condition)", "fading", "moving"]
    assert not re.search(r"<video[^>]* controls", page)


def test_small_clips_are_enlarged_without_smoothing():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 10, 3), dtype=np.uint8)
    report = Report("T")
    report.clips("small", {"a": {"still": frames[:1], "clip": frames}}, 7)
    data = base64.b64decode(re.findall(r'src="data:image/png;base64,(.*?)"', report.page())[0])
    still = np.asarray(Image.open(io.BytesIO(data)))
    assert still.shape == (96, 120, 3) and np.array_equal(still[::12, ::12], frames[0])
    assert 'class="clips small"' in report.page() and ".small img { image-rendering: pixelated }" in report.page()


def test_names_on_the_page_may_be_broken():
    table = html_table(["", "FVD ↓"], [["a_long/<name>", 1]])
    assert "a_<wbr>long/<wbr>&lt;name&gt;" in table and "<th>FVD\u00a0↓</th>" in table
    assert "longer_than_what_fits" not in dot_plot("T", {"longer_than_what_fits": [1.0]}, "x")


def test_equal_first_frames_are_written_as_identical(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a table wider than the terminal is printed turned
    found = [clip for clip in clips.find_clips(folder) if clip.name in "ab" and clip.seed != 1]
    own = {(clip.group, clip.name): frames for clip, frames in clips.Reading().frames(found)}
    results = no_reference.score_clips(
        ((clip, own[clip.group, clip.name]) for clip in found),
        images=lambda name: own["moving", name][0],
        flow=False,
    )
    report = Report("T")
    no_reference.add_to(report, results, clips.Reading(), "test")
    head, fading, moving = report.headline.splitlines()
    assert "first PSNR, dB ↑" in head and "*identical" in moving and "identical" not in fading
    assert "inf" not in report.page()


def test_curves_are_means_of_what_is_known():
    curves = [[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]]
    rows = [no_reference.Row("g", str(n), None, (8, 8), {}, {"detail": x}) for n, x in enumerate(curves)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = no_reference.Results(rows).curve("g", "detail")
    np.testing.assert_array_equal(found, [2, 4, np.nan])
    assert no_reference.Results(rows).curve("other", "detail") is None

"""`evaluate --paired`: which clips are compared, what is refused at once, and the numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.video import VideoError, write_video
from sfv_jax.evaluation import pairs, request, scoring
from sfv_jax.evaluation.clips import Clip, Reading
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.mmd import squared_mmd
from sfv_jax.evaluation.protocol import Protocol

PROTOCOL = Protocol(n=0, num_frames=3, score_height=8, score_width=8)
UNUSED = Extractor(lambda x: pytest.fail("clips were read"), {})
MEANS = Extractor(lambda x: x.astype(np.float32).mean((1, 2, 3)), {"kind": "function", "function": "means"})


def write(path: Path, level: int) -> None:
    write_video(path, np.full((3, 16, 16, 3), level, np.uint8), fps=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six conditions of gray clips by three methods; `near` has two seeds, `far` lacks one condition."""
    root = tmp_path_factory.mktemp("videos")
    for n in range(6):
        write(root / f"base/{n}.mp4", 20 * n + 40)
        for seed in (0, 1):
            write(root / f"near/{n}-seed{seed}.mp4", 20 * n + 44 + 4 * seed)
        if n:
            write(root / f"far/{n}.mp4", 20 * n + 40 + 12 * n)
    return root


def means(*clips: Clip) -> list[np.ndarray]:
    """Returns the mean color of each clip."""
    return [x.astype(float).mean((0, 1, 2)) for _, x in Reading(3, 7.0).frames([*clips])]


def test_each_group_is_compared_with_the_references_of_the_same_conditions(folder):
    groups = pairs.match(folder, folder / "base")
    assert {group: len(found) for group, found in groups.items()} == {"far": 5, "near": 12}  # not `base` itself
    report = pairs.folder_paired(folder, folder / "base", PROTOCOL, MEANS, groups)
    found = report.record["paired"]
    assert found["far"]["distance"]["n"] == 5 and found["near"]["distance"]["n"] == 6  # conditions, not clips
    for group in ("near", "far"):
        clips = [(clip, *means(clip, other)) for clip, other in groups[group]]
        for name, value in found[group]["conditions"].items():
            mine = [np.sqrt(np.sum((a - b) ** 2)) for clip, a, b in clips if clip.name == name]
            assert value == pytest.approx(np.mean(mine), rel=1e-5)
        firsts = {clip.name: (a, b) for clip, a, b in reversed(clips)}
        a, b = (np.stack(x) for x in zip(*(firsts[name] for name in sorted(firsts)), strict=True))
        assert found[group]["mmd"]["value"] == pytest.approx(squared_mmd(b, a, paired=True), rel=1e-4)
        assert found[group]["distance"]["value"] == pytest.approx(np.mean([*found[group]["conditions"].values()]))
    assert found["near"]["distance"]["interval"][1] < found["far"]["distance"]["interval"][0]
    assert json.dumps(report.record) and "conditions" in report.page()


def test_references_with_seeds_belong_to_clips_of_the_same_seed(folder, tmp_path):
    for n in range(5):
        for seed in (0, 1):
            write(tmp_path / f"{n}-seed{seed}.mp4", 100)
    found = pairs.match(folder / "near", tmp_path)[""]
    assert len(found) == 10 and all((clip.name, clip.seed) == (other.name, other.seed) for clip, other in found)
    with pytest.raises(VideoError, match="base: 0 conditions have a reference of the same name"):
        pairs.match(folder / "base", tmp_path)


def test_what_cannot_be_compared_is_refused_before_a_clip_is_read(folder, tmp_path):
    for n in range(4):
        write(tmp_path / f"few/{n}.mp4", 9)
    for reference, message in (
        (folder, r"base/1.mp4 and .*far/1.mp4|far/1.mp4 and .*base/1.mp4"),
        (tmp_path / "few", "base: 4 conditions have a reference of the same name, fewer than the 5"),
    ):
        with pytest.raises(VideoError, match=message):
            request.run(request.Request(tmp_path / "out", folder, reference, paired=True, protocol=PROTOCOL))
    with pytest.raises(VideoError, match="holds no clips but the references"):
        pairs.match(folder / "base", folder / "base")


def test_clips_that_cannot_be_read_are_named_and_counted(folder, tmp_path):
    for n in range(6):
        (tmp_path / f"v/{n}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / f"v/{n}.mp4").write_bytes((folder / f"base/{n}.mp4").read_bytes() if n else b"")
    args = (tmp_path / "v", folder / "base", PROTOCOL, MEANS)
    report = pairs.folder_paired(*args, pairs.match(*args[:2]))
    assert report.record["paired"]["all"]["distance"] == {"value": 0, "interval": (0, 0), "n": 5}
    assert len(report.missing) == 1 and "0.mp4" in report.missing[0]
    (tmp_path / "v/1.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match="v: 4 conditions can be read, fewer than the 5 that --paired needs"):
        pairs.folder_paired(*args, pairs.match(*args[:2]))


def test_the_page_has_the_references_beside_the_clips(folder):
    groups = pairs.match(folder, folder / "base")
    clips = pairs.shown(groups, 2)
    assert {(clip.group, clip.name) for clip in clips} == {
        *(("reference", "0"), ("reference", "1"), ("near", "0"), ("near", "1"), ("far", "1"))
    }
    report = pairs.folder_paired(folder, folder / "base", PROTOCOL, MEANS, groups)
    scoring.add_clips(report, clips, replace(PROTOCOL, score_height=16, score_width=16))
    assert report.page().count("<video ") == 5

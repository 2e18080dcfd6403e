"""Longer videos: the first chunk, seams, colors over seams, seeds, what is compiled, records, impossible values."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sfv_jax.data.video import read_comment
from sfv_jax.data.worlds import Body, Label, World
from sfv_jax.errors import UserError
from sfv_jax.models.networks import Networks
from sfv_jax.reproduction.experiments import SCENES
from sfv_jax.sampling import files
from sfv_jax.sampling.extension import Extension, correction
from sfv_jax.sampling.sampler import Sampler
from tests import extension_drift
from tests.sampling.test_sampler import CODEC, IMAGES, UNET, random_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(UNET, random_weights(Networks(UNET).abstract["generator"]), CODEC)


@pytest.mark.parametrize("options", [{}, dict(steps=2, sampler="sfv", guidance=(1.0, 2.0))], ids=["one step", "two"])
def test_the_first_chunk_is_the_video_without_extension(sampler, options):
    seed = [7, 40]
    longer = sampler.extend(IMAGES, 2, seed=seed, **options)
    assert longer.shape == (2, 7, 8, 8, 3) and longer.dtype == np.uint8
    np.testing.assert_array_equal(longer[:, :3], sampler(IMAGES, seed=seed, **options))
    np.testing.assert_array_equal(longer, sampler.extend(IMAGES, Extension(2), seed=seed, **options))
    np.testing.assert_array_equal(longer[:, :5], sampler.extend(IMAGES, 1, seed=seed, **options))
    np.testing.assert_array_equal(longer[:, :3], sampler.extend(IMAGES, 0, seed=seed, **options))


def test_a_chunk_is_the_video_of_the_last_frame_without_its_first(sampler):
    """With colors kept as decoded, any chunk can be made again by a plain call with its recorded seed."""
    extension = Extension(2, noise_aug_strength=0.1)
    longer = sampler.extend(IMAGES, extension, seed=[7, 40])
    seeds = [extension.seeds(seed) for seed in (7, 40)]
    assert len({*seeds[0], *seeds[1]}) == 6 and all(0 <= seed < 2**32 for seed in (*seeds[0], *seeds[1]))
    for n in (1, 2):
        chunk = sampler(longer[:, 2 * n], seed=[own[n] for own in seeds], noise_aug_strength=0.1)
        np.testing.assert_array_equal(longer[:, 2 * n + 1 : 2 * n + 3], chunk[:, 1:])


def test_seeds_of_chunks_never_change():
    assert Extension(3).seeds(0) == [0, 3964924996, 3141116543, 2613022947]
    assert Extension(1).seeds(2**32 - 1)[0] == 2**32 - 1


def test_start_noise_is_that_of_the_first_chunk(sampler):
    noise = np.random.default_rng(4).standard_normal((2, 3, 4, 4, 12), np.float32)
    longer = sampler.extend(IMAGES, Extension(1), seed=[7, 40], noise=noise)
    np.testing.assert_array_equal(longer[:, :3], sampler(IMAGES, seed=[7, 40], noise=noise))
    seeds = [Extension(1).seeds(seed)[1] for seed in (7, 40)]
    np.testing.assert_array_equal(longer[:, 3:], sampler(longer[:, 2], seed=seeds)[:, 1:])


def test_nothing_is_compiled_for_further_chunks(sampler):
    sampler.extend(IMAGES, 1)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(name) if "backend_compile" in name else None
    )
    sampler.extend(IMAGES, Extension(3, noise_aug_strength=0.2), seed=9)
    assert not compilations
    sampler(IMAGES, seed=9)
    assert not compilations  # nor is it another program


def test_times_are_sums_and_steps_are_watched(sampler, capsys):
    times: dict[str, float] = {}
    from sfv_jax.runtime.progress import progress

    sampler.extend(IMAGES, 1, steps=2, times=times, watch=progress)
    assert list(times) == ["clip", "encode", "denoise", "decode"]
    assert capsys.readouterr().err.count("2 of 2 sampling steps") == 2


WORLD = World(size=32, num_frames=40, speeds=(1.0,), directions=4)


def moving(shift=0.0, calls=None):
    """Returns a model of pictures that move right by a pixel per frame, 5 frames long, perfect but for their colors."""

    def call(images, seed, **options) -> Iterator[np.ndarray]:
        if calls is not None:
            calls.append((np.array(images), seed, options))
        for n in range(5):
            yield np.clip(np.roll(np.float32(images), n, axis=2) + shift, 0, 255).astype(np.uint8)

    return call


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    body = Body("disc", "blue", 5.0, (8.0, 16.0), 0, 1.0)
    return WORLD.render(Label((body,), 0), slice(0, 1))


def test_seams_are_even(first):
    """Frames go on as if there were no seam: none twice, none left out, and each chunk starts from the last frame."""
    calls: list = []
    frames = [*Extension(3, 0.3).frames(moving(calls=calls), first, [5], {"noise_aug_strength": 0.02, "noise": 1})]
    assert len(frames) == Extension(3).length(5) == 17
    for n, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, np.roll(first, n, axis=2))
    for n, (images, seed, _) in enumerate(calls):
        np.testing.assert_array_equal(images, frames[4 * n])
        assert seed == [Extension(3).seeds(5)[n]]
    assert [options for *_, options in calls] == [{"noise_aug_strength": 0.02, "noise": 1}] + 3 * [
        {"noise_aug_strength": 0.3}
    ]


@pytest.mark.parametrize("shift", [4.0, -3.0])
def test_colors_do_not_drift_over_seams(first, shift):
    """What a model adds to every chunk adds up without correction, and not at all with it."""

    def last(color: str) -> np.ndarray:
        *_, frame = Extension(6, color=color).frames(moving(shift), first, [5], {})
        return np.roll(frame, -28, axis=2).astype(float)

    once = next(moving(shift)(first, [5])).astype(float)
    assert np.abs(last("match") - once).mean() < 0.5
    assert np.abs(last("keep") - once).mean() > 5 * abs(shift)


def test_corrections_have_bounds_of_pixels_and_keep_contrast():
    dark, bright = (np.random.default_rng(0).integers(0, 100, (2, 4, 4, 3)) + n for n in (0, 155))
    dark, bright = dark.astype(np.uint8), bright.astype(np.uint8)
    change = correction(dark, bright, "match")
    np.testing.assert_array_equal(change(dark), bright)
    assert change(bright).max() == 255 and correction(bright, dark, "match")(dark).min() == 0
    assert correction(dark, bright, "keep")(bright) is bright


def test_the_measure_of_drift_finds_what_a_model_does_wrong():
    """True clips are legal over any number of seams; a frame twice, other colors and other shapes are found."""
    world = World(**SCENES | {"num_frames": 5})
    label = world.label(3, "heldout")
    frames = dataclasses.replace(world, num_frames=13).render(label)
    true = extension_drift.drift(world, label, frames, [0, 2])
    assert true[2]["distance"] < 0.5 and true[0]["kept"] == true[2]["kept"] == 1
    assert true[2]["seam"] == pytest.approx(1, abs=0.2) and math.isnan(true[0]["seam"])
    twice = np.concatenate([frames[:9], frames[8:12]])
    assert extension_drift.drift(world, label, twice, [2])[2]["seam"] < 0.1
    brighter = np.clip(frames.astype(int) + 4 * np.arange(13)[:, None, None, None], 0, 255).astype(np.uint8)
    found = extension_drift.drift(world, label, brighter, [2])[2]
    assert found["distance"] > 20 and found["color"] > 20 > 5 > true[2]["color"]
    bodies = tuple(dataclasses.replace(body, colour="yellow", shape="disc") for body in label.bodies)
    other = dataclasses.replace(world, num_frames=13).render(dataclasses.replace(label, bodies=bodies))
    assert extension_drift.drift(world, label, np.concatenate([frames[:9], other[9:]]), [2])[2]["kept"] < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(chunks=-1), "chunks -1: give a whole number from 0 to 1000"),
        (dict(chunks=1.5), "chunks 1.5: give a whole number"),
        (dict(chunks=True), "chunks True: give a whole number"),
        (dict(chunks=10**9), "chunks 1000000000: give a whole number"),
        (dict(chunks=1, noise_aug_strength=-0.1), "noise_aug_strength -0.1 of further chunks: give a number from 0"),
        (dict(chunks=1, noise_aug_strength=float("nan")), "noise_aug_strength nan of further chunks"),
        (dict(chunks=1, color="blue"), "color 'blue': choose one of keep, match"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(UserError, match=message) as caught:
        Extension(**values)
    assert "\n" not in str(caught.value)


def test_impossible_calls(sampler):
    with pytest.raises(UserError, match="a video of 1 frame cannot be extended"):
        sampler.extend(IMAGES, 1, num_frames=1)
    assert sampler.extend(IMAGES, 0, num_frames=1).shape[1] == 1
    with pytest.raises(UserError, match="2 images need as many seeds, got 1"):
        sampler.extend(IMAGES, 1, seed=[1])
    with pytest.raises(UserError, match="no images"):
        sampler.extend([], 1)


def settings(extension: Extension | None, batch_size=1, **changes) -> files.Settings:
    options = dict.fromkeys(files.OPTIONS) | dict(steps=1, sampler="euler", fit="crop", fps=7, motion_bucket_id=127)
    options |= dict(noise_aug_strength=0.02, guidance=None) | changes
    return files.Settings(options, 3, batch_size, False, {"checkpoint": "c"}, extension)


def test_videos_and_records_of_a_folder(sampler, tmp_path):
    for n, image in enumerate(IMAGES):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"in/{n}.png")
    extension = Extension(2, 0.05, "match")
    for batch_size in (1, 2):
        out = tmp_path / str(batch_size)
        files.run(sampler, files.jobs(tmp_path / "in", out, "png"), settings(extension, batch_size))
        for n in range(2):
            record = json.loads((out / f"{n}.json").read_text())
            seeds = extension.seeds(3 + n)
            known = {"chunks": 2, "noise_aug_strength": 0.05, "color": "match", "chunk_frames": 3, "seeds": seeds}
            assert record["extend"] == known and record["num_frames"] == 7 and record["seed"] == 3 + n
            assert Image.open(out / f"{n}.png").size == (7 * 8, 8)
    files.run(sampler, files.jobs(tmp_path / "in", tmp_path / "plain", "png"), settings(None))
    assert "extend" not in json.loads((tmp_path / "plain/0.json").read_text())
    plain, longer = (np.asarray(Image.open(tmp_path / name / "0.png")) for name in ("plain", "1"))
    np.testing.assert_array_equal(longer[:, :24], plain)


def test_frames_of_longer_videos_are_written_as_they_come(sampler, tmp_path, monkeypatch):
    """A tiny decoder's frames are; each chunk is that of `stream`, and the record is inside the mp4, too."""
    Image.fromarray(IMAGES[0]).save(tmp_path / "in.png")
    monkeypatch.setattr(sampler, "decoder", {"name": "tiny"}, raising=False)
    monkeypatch.setattr(sampler, "extend", lambda *_, **__: pytest.fail("decoded whole"), raising=False)
    kept: list[np.ndarray] = []
    write = files.write_video
    monkeypatch.setattr(files, "write_video", lambda path, frames, **kw: write(path, keeping(frames, kept), **kw))
    for extension in (None, Extension(2)):
        kept.clear()
        files.run(sampler, files.jobs(tmp_path / "in.png", tmp_path / "out.mp4", "mp4"), settings(extension))
        for n, frame in enumerate(sampler.stream(IMAGES[0], seed=3)):
            np.testing.assert_array_equal(kept[n], frame)
    assert len(kept) == 7
    record = json.loads(read_comment(tmp_path / "out.mp4"))
    assert record["extend"]["seeds"] == Extension(2).seeds(3) and record["num_frames"] == 7
    (tmp_path / "out.json").unlink()
    with pytest.raises(UserError, match="sampler 'ddim'"):
        files.run(
            sampler,
            files.jobs(tmp_path / "in.png", tmp_path / "new.mp4", "mp4"),
            settings(Extension(1), sampler="ddim"),
        )
    assert not (tmp_path / "new.json").exists() and not (tmp_path / "new.mp4").exists()


def keeping(frames, kept: list) -> Iterator[np.ndarray]:
    for frame in frames:
        kept.append(frame)
        yield frame


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extend=-1"], "flag --extend=-1: "),
        (["--extend=1001"], "flag --extend=1001: "),
        (["--extend=two"], "flag --extend=two: "),
        (["--extend=1", "--num_frames=1"], "a video of 1 frame cannot be extended"),
        (["--extend=1", "--extend_color=blue"], "flag --extend_color=blue: "),
        (["--extend=1", "--extend_noise_aug_strength=-1"], "flag --extend_noise_aug_strength=-1: "),
        (["--extend=1", "--extend_noise_aug_strength=nan"], "flag --extend_noise_aug_strength=nan: "),
    ],
)
def test_impossible_flags_are_one_line(arguments, message, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "in.png")
    given = [f"--checkpoint={tmp_path}", f"--image={tmp_path / 'in.png'}", f"--out={tmp_path / 'out.mp4'}"]
    program = [sys.executable, "-m", "sfv_jax.sample", *given, *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "out.json").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"sample: {message}")


@pytest.mark.slow
def test_the_command(smallest_model_folder, tmp_path):
    """A folder of images to longer videos by the networks of SVD's kinds."""
    (tmp_path / "in").mkdir()
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{n}.png")
    program = [sys.executable, "-m", "sfv_jax.sample", f"--checkpoint={smallest_model_folder}"]
    program += [f"--image={tmp_path / 'in'}", "--format=png", "--batch_size=2", "--num_frames=3", "--steps=2"]
    program.append("--extend_noise_aug_strength=0.1")
    strips = []
    for extend in (0, 2):
        out = tmp_path / str(extend)
        run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
        done = run([*program, f"--out={out}", f"--extend={extend}"])
        assert done.returncode == 0, done.stderr
        strips.append(np.asarray(Image.open(out / "1.png")))
    assert strips[1].shape == (64, 7 * 64, 3)
    np.testing.assert_array_equal(strips[1][:, : 3 * 64], strips[0])
    record = json.loads((tmp_path / "2/1.json").read_text())
    assert record["extend"] == {
        "chunks": 2,
        "noise_aug_strength": 0.1,
        "color": "keep",
        "chunk_frames": 3,
        "seeds": Extension(2).seeds(1),
    }

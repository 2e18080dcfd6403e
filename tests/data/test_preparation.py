"""From videos to batches: the cache is exact and complete or refused, the loader resumes and shards exactly."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from sfv_jax.checkpoints import base
from sfv_jax.data import latents, preparation
from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import latent_source
from sfv_jax.data.preparation import PrepareError, Settings
from sfv_jax.data.video import VideoError, read_clip, write_video
from sfv_jax.data.worlds import World
from sfv_jax.models.codec import PatchCodec
from sfv_jax.runtime.locks import LockError
from tests.support.small_cache import SETTINGS, WORLD, contents, encode, write_encoders


class Counting:
    """`encode` that counts its calls and is interrupted after `limit` of them."""

    def __init__(self, limit: int = 10**9):
        self.calls, self.limit = 0, limit

    def __call__(self, frames, seeds):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return encode(frames, seeds)


def assert_unfinished(folder):
    with pytest.raises(LatentError, match="a cache that is not finished; run the same command"):
        latent_source(folder)


def test_cache_holds_what_the_encoder_said_bit_for_bit(videos, cache):
    out, manifest = cache
    source = latent_source(out)
    assert manifest["clips"] == {"train": 8} and len(source) == 8
    for record in source.records:
        name, key = record["source"].decode(), record["key"].decode()
        frames = read_clip(videos / name, 4, 7, record["start"], height=32, width=48)
        seeds = np.array([preparation._hash(0, key)], np.uint32)
        for array, expected in encode(frames[None], seeds).items():
            assert record[array].dtype == np.float16
            assert np.array_equal(record[array], expected[0].astype(np.float16))
        assert key == f"{name}@0.000"
        assert [record[k] for k in ("fps", "motion_bucket_id", "schema")] == [7, 127, latents.SCHEMA]


def test_unusable_files_are_listed_with_reasons(cache):
    out, manifest = cache
    reasons = {entry["clip"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(reasons) == {f"{name}@0.000" for name in ("short.mp4", "0/broken.mp4", "text.mp4", "1/empty.mkv")}
    assert "too short: 3 of 4" in reasons["short.mp4@0.000"]
    written = json.loads((out / latents.MANIFEST).read_text())
    assert written == manifest and written["settings"]["height"] == 32


def test_every_file_of_a_folder_is_read_or_named(videos, tmp_path):
    """Names that FFmpeg takes for protocols or that are no text, pipes, damage and changes of size end no job."""
    folder = tmp_path / "in"
    folder.mkdir()
    sound = (videos / "0" / "clip0.mp4").read_bytes()
    for name in ("sound.mp4", "a:b.mp4", os.fsdecode(b"latin-\xe9.mp4")):
        (folder / name).write_bytes(sound)
    (folder / os.fsdecode(b"broken-\xe9.mp4")).write_bytes(sound[: len(sound) // 2])
    (folder / "bytes.webm").write_bytes(bytes(range(256)) * 20)
    os.mkfifo(folder / "pipe.mp4")
    settings = dataclasses.replace(SETTINGS, clips_per_video=2, heldout_fraction=0.2)
    manifest = preparation.run(folder, tmp_path / "out", encode, settings)
    assert sum(manifest["clips"].values()) == 6
    skipped = {entry["clip"].split("@")[0]: entry["reason"] for entry in manifest["skipped"]}
    assert skipped.keys() == {"broken-\\xe9.mp4", "bytes.webm"}
    assert all(reason.isprintable() and "cannot read" in reason for reason in skipped.values())
    records = [record for split in manifest["clips"] for record in latent_source(tmp_path / "out", split).records]
    assert {record["source"].decode() for record in records} == {"sound.mp4", "a:b.mp4", "latin-\\xe9.mp4"}


def test_batches_and_workers_do_not_change_the_content(videos, cache, tmp_path):
    preparation.run(videos, tmp_path / "batched", encode, SETTINGS, batch_size=3, threads=1)
    assert preparation.run(videos, tmp_path / "shared", encode, SETTINGS, worker=1, workers=2) is None
    assert_unfinished(tmp_path / "shared")
    preparation.run(videos, tmp_path / "shared", encode, SETTINGS, worker=0, workers=2)
    expected = contents(cache[0])
    assert contents(tmp_path / "batched") == expected
    assert contents(tmp_path / "shared") == expected
    with pytest.raises(PrepareError, match="count from 0"):
        preparation.run(videos, tmp_path / "shared", encode, SETTINGS, worker=2, workers=2)


def test_an_interrupted_run_continues_to_the_same_content(videos, cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        preparation.run(videos, tmp_path, Counting(limit=4), SETTINGS)
    assert_unfinished(tmp_path)
    done = sorted(tmp_path.glob("latents-*"))
    assert 1 <= len(done) < 4 and not list(tmp_path.rglob("*.tmp"))
    # A killed process leaves a part under a temporary name and a truncated shard.
    (tmp_path / ".latents-train.array_record-00003-of-00004.99.tmp").write_bytes(b"half")
    done[0].write_bytes(done[0].read_bytes()[:-100])
    resumed = Counting()
    preparation.run(videos, tmp_path, resumed, SETTINGS)
    assert contents(tmp_path) == contents(cache[0])
    again = Counting()
    preparation.run(videos, tmp_path, again, SETTINGS)
    assert 4 < resumed.calls <= 8 and again.calls == 0


def test_other_settings_or_videos_are_refused(videos, cache, tmp_path):
    out, _ = cache
    other = Settings(height=32, width=48, num_frames=4, shard_size=3, noise_aug_strength=0.1)
    with pytest.raises(LatentError, match=r"noise_aug_strength \(was 0.02, is 0.1\)"):
        preparation.run(videos, out, encode, other)
    with pytest.raises(LatentError, match="videos"):
        preparation.run(videos / "0", out, encode, SETTINGS)


def test_nothing_usable_leaves_nothing_that_looks_finished(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(VideoError, match="no video files"):
        preparation.run(tmp_path / "in", tmp_path / "out", encode, SETTINGS)
    (tmp_path / "in" / "a.mp4").write_text("text")
    with pytest.raises(VideoError, match="none of 1 clips is usable"):
        preparation.run(tmp_path / "in", tmp_path / "out", encode, SETTINGS)
    assert_unfinished(tmp_path / "out")
    write_video(tmp_path / "in" / "a.mp4", WORLD.clip(0)[0])
    assert preparation.run(tmp_path / "in", tmp_path / "out", encode, SETTINGS)["clips"] == {"train": 1}


@pytest.mark.parametrize("value", [np.nan, 1e5])
def test_values_that_float16_cannot_hold_name_the_clip(videos, tmp_path, value):
    def broken(frames, seeds):
        encoded = encode(frames, seeds)
        encoded["latents"][0, 1, 2, 3, 0] = value
        return encoded

    with pytest.raises(LatentError, match="clip 0/clip0.mp4@0.000: 1 of 384 values of latents"):
        preparation.run(videos, tmp_path, broken, SETTINGS)
    assert_unfinished(tmp_path)


def test_several_clips_per_video_and_a_heldout_split(videos, tmp_path):
    settings = Settings(height=32, width=48, num_frames=4, clips_per_video=3, heldout_fraction=0.4)
    manifest = preparation.run(videos, tmp_path, encode, settings)
    assert sum(manifest["clips"].values()) == 16  # 8 frames hold two clips of 4
    train, heldout = ({r["source"] for r in latent_source(tmp_path, s).records} for s in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert {float(r["start"]) for r in latent_source(tmp_path).records} == {0.0, np.float32(0.571)}
    with pytest.raises(LatentError, match="no split 'test'"):
        latent_source(tmp_path, "test")


def test_sizes_off_the_grid_name_the_nearest():
    with pytest.raises(PrepareError, match="height 450 is not .* 448 and 456"):
        Settings(height=450)
    with pytest.raises(PrepareError, match="width 0 .* nearest: 8"):
        Settings(width=0)
    with pytest.raises(PrepareError, match="heldout_fraction"):
        Settings(heldout_fraction=1.0)


def test_first_frame_noise_belongs_to_the_clip():
    frames, _ = World(size=32).batch(range(3))
    seeds = np.array([5, 6, 7], np.uint32)
    codec = PatchCodec()
    encoder = preparation.make_encoder(codec, noise_aug_strength=0.02, seed=0)
    together, alone = encoder(frames, seeds), encoder(frames[1:2], seeds[1:2])
    for name in latents.ARRAYS:
        np.testing.assert_allclose(together[name][1], alone[name][0], atol=1e-6)
    noise = together["cond_latent"] - together["latents"][:, 0]
    assert np.std(noise) == pytest.approx(0.02, rel=0.05)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    other = preparation.make_encoder(codec, noise_aug_strength=0.02, seed=1)(frames, seeds)
    assert not np.allclose(other["cond_latent"], together["cond_latent"])


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("svd"))


def command(**options) -> subprocess.CompletedProcess:
    options = {"height": 32, "width": 48, "num_frames": 4} | options
    flags = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run([sys.executable, "-m", "sfv_jax.prepare", *flags], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.short
def test_the_command_encodes_with_the_networks_of_svd(videos, svd, tmp_path):
    done = command(videos=videos, svd=svd, out=tmp_path, batch_size=2)
    assert done.returncode == 0, done.stderr
    assert "skipped text.mp4@0.000" in done.stdout and "8 clips in train, 4 skipped" in done.stdout
    codec, _ = base.load_encoders(svd)
    record = latent_source(tmp_path).records[0]
    frames = read_clip(videos / record["source"].decode(), 4, height=32, width=48)
    np.testing.assert_allclose(record["latents"], codec.encode(frames[None])[0], atol=2e-3)
    np.testing.assert_allclose(record["image_embed"], codec.embed(frames[:1])[0], atol=2e-3)
    assert np.abs(record["cond_latent"] - record["latents"][0]).max() > 0


@pytest.mark.slow
def test_the_command_says_what_is_wrong_without_a_traceback(videos, svd, tmp_path):
    for options, message in (
        ({"width": 50}, "width 50 is not a positive multiple of 8; nearest: 48 and 56"),
        ({"svd": tmp_path}, "vae"),
        ({"videos": tmp_path}, "no video files"),
    ):
        failed = command(**{"videos": videos, "svd": svd, "out": tmp_path / "out"} | options)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert failed.stderr.splitlines()[-1].startswith("prepare: ") and message in failed.stderr


# ---- interruptions and neighbors ----


def test_a_second_worker_leaves_the_shard_of_the_first_alone(videos, tmp_path):
    """The temporary file of a live process must not be deleted."""

    class Meets(Counting):
        def __call__(self, frames, seeds):
            if not self.calls:
                with pytest.raises(LockError, match=f"00000-of-0000.* is in use by process {os.getpid()}"):
                    preparation.run(videos, tmp_path, encode, SETTINGS)
            return super().__call__(frames, seeds)

    assert preparation.run(videos, tmp_path, Meets(), SETTINGS)
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*.tmp"))


def test_a_video_that_was_replaced_is_noticed(videos, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, folder)
    with pytest.raises(KeyboardInterrupt):
        preparation.run(folder, out, Counting(limit=4), SETTINGS)
    done = next(iter(sorted(out.glob("progress/*.json"))))
    first, last = (folder / f"{n % 2}" / f"clip{n}.mp4" for n in (0, 7))  # in the first shard, in the last one
    last.write_bytes((folder / "0" / "clip2.mp4").read_bytes())  # not encoded yet
    first.write_bytes((folder / "0" / "clip4.mp4").read_bytes())
    with pytest.raises(
        LatentError, match=f"{first} changed since .* was made from it: delete {done} to make that shard"
    ):
        preparation.run(folder, out, encode, SETTINGS)
    done.unlink()
    preparation.run(folder, out, encode, SETTINGS)
    preparation.run(folder, tmp_path / "anew", encode, SETTINGS)
    assert contents(out) == contents(tmp_path / "anew")


@pytest.mark.parametrize("content", ["[]", "", "{", '{"settings": {}}'])
def test_a_damaged_manifest_or_report_is_one_line_or_made_anew(videos, cache, tmp_path, content):
    out = tmp_path / "cache"
    shutil.copytree(cache[0], out)
    report = sorted(out.glob("progress/*.json"))[0]
    report.write_text(content)
    preparation.run(videos, out, encode, SETTINGS)
    assert contents(out) == contents(cache[0])
    (out / latents.MANIFEST).write_text(content)
    with pytest.raises(LatentError, match=r"manifest.json cannot be used: .*; delete it and run") as caught:
        preparation.run(videos, out, encode, SETTINGS)
    assert "\n" not in str(caught.value)


def test_out_that_is_a_file(videos, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(PrepareError, match="--out .*out cannot be used"):
        preparation.run(videos, tmp_path / "out", encode, SETTINGS)


def test_locks_of_finished_shards_are_removed(videos, cache, tmp_path):
    """A worker may be killed between the report of its last shard and the release of the lock."""
    out, _ = cache
    shutil.copytree(out, tmp_path / "copy")
    for name in ("train-00000.lock", ".train-00000.lock.0123456789abcdef.tmp"):
        (tmp_path / "copy/progress" / name).write_text("{}")
    preparation.run(videos, tmp_path / "copy", encode, SETTINGS)
    assert contents(tmp_path / "copy") == contents(out)

"""From videos to batches: the cache is exact and complete or refused, the loader resumes and shards exactly."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sfv_jax.checkpoints import base
from sfv_jax.data import latents, preparation
from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import latent_source, make_loader, world_source
from sfv_jax.data.preparation import PrepareError, Settings
from sfv_jax.data.video import VideoError, read_clip, write_video
from sfv_jax.data.worlds import World
from sfv_jax.models import clip, tree, vae
from sfv_jax.models.codec import PatchCodec
from sfv_jax.runtime.locks import LockError
from sfv_jax.weights.diffusers import save_component

SETTINGS = Settings(height=32, width=48, num_frames=4, shard_size=3)
WORLD = World(size=48, num_frames=4)


def encode(frames: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Stands in for the networks: block means as latents, noise on the first frame from the clip's own seed."""
    b, t, h, w, _ = frames.shape
    mean = frames.reshape(b, t, h // 8, 8, w // 8, 8, 3).mean((3, 5), dtype=np.float32) / 255
    values = np.concatenate([mean, mean.mean(-1, keepdims=True)], -1)
    noise = np.stack([np.random.default_rng(seed).normal(size=values.shape[2:]) for seed in seeds])
    return {"latents": values, "cond_latent": values[:, 0] + noise, "image_embed": values[:, 0].mean(1).reshape(b, -1)}


class Counting:
    """`encode` that counts its calls and is interrupted after `limit` of them."""

    def __init__(self, limit: int = 10**9):
        self.calls, self.limit = 0, limit

    def __call__(self, frames, seeds):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return encode(frames, seeds)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight usable videos of 1.14 s and four unusable ones."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(8):
        frames, _ = World(size=48, num_frames=8).clip(index)
        write_video(folder / f"{index % 2}" / f"clip{index}.mp4", frames)
    write_video(folder / "short.mp4", WORLD.clip(0)[0][:3])
    (folder / "0" / "broken.mp4").write_bytes((folder / "0" / "clip0.mp4").read_bytes()[:900])
    (folder / "text.mp4").write_text("not a video")
    (folder / "1" / "empty.mkv").touch()
    return folder


@pytest.fixture(scope="module")
def cache(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    return out, preparation.run(videos, out, encode, SETTINGS)


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


def test_only_video_latents_are_scaled(cache):
    source = latent_source(cache[0], scaling_factor=0.5)
    record, example = source.records[2], source[2]
    assert {k: (v.shape, v.dtype.name) for k, v in example.items()} == {
        "latents": ((4, 4, 6, 4), "float32"),
        "cond_latent": ((4, 6, 4), "float32"),
        "image_embed": ((24,), "float32"),
        "ids": ((3,), "float32"),
    }
    np.testing.assert_array_equal(example["latents"], record["latents"].astype(np.float32) * 0.5)
    np.testing.assert_array_equal(example["cond_latent"], record["cond_latent"].astype(np.float32))
    np.testing.assert_allclose(example["ids"], [6, 127, 0.02])


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


def write_encoders(folder):
    """Writes the two encoders of a tiny SVD folder with random weights; returns the folder."""
    rng = np.random.default_rng(0)
    for name, module, config in (
        ("vae", vae.TemporalVAE, vae.VAEConfig.tiny()),
        ("image_encoder", clip.CLIPVision, clip.CLIPConfig.tiny()),
    ):
        _, shapes = tree.abstract(module, config)
        params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
        save_component(folder / name, name, params, config)
    return folder


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


# ---- broken caches: messages with cause, place and remedy ----


def first_shard(folder):
    return latents.shard_path(folder, "train", 0, 4)


def corrupt_shard(folder):
    content = bytearray(first_shard(folder).read_bytes())
    content[content.find(latent_source(folder).records[0]["latents"].tobytes()[:40]) + 10] ^= 64
    first_shard(folder).write_bytes(content)


def truncated_shard(folder):
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-200])


def lost_shard(folder):
    first_shard(folder).unlink()


def rewrite(folder, **changes):
    names = ("fps", "motion_bucket_id", "noise_aug_strength", "key", "source", "start", "schema", *latents.ARRAYS)
    records = [
        {k: np.array(r[k]) if k in latents.ARRAYS else r[k] for k in names} for r in latent_source(folder).records
    ]
    first = [r | {k: change(r[k]) for k, change in changes.items()} for r in records[:2]]
    latents.write_shard(first_shard(folder), first)


def nan_latent(folder):
    rewrite(folder, latents=lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.float16(np.nan), x))


def wrong_shape(folder):
    rewrite(folder, cond_latent=lambda x: x[:, :-1])


def other_schema(folder):
    rewrite(folder, schema=lambda version: version + 1)


def damaged_metadata(folder):
    (folder / "features.json").write_text("{")


def empty_folder(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


BROKEN = {
    corrupt_shard: "00000-of-00004 is damaged .*hash mismatch.*delete that file and run",
    truncated_shard: "00000-of-00004 cannot be read, expected 2 records; delete that file and run",
    lost_shard: "00000-of-00004 is missing: run",
    nan_latent: "clip 0/clip.*latents is not finite; delete that file and run .*00000-of-00004",
    wrong_shape: "00000-of-00004 is damaged .*delete that file",
    other_schema: "clip 0/clip.*schema 2, this code reads 1; make the cache anew",
    damaged_metadata: "features.json cannot be used: it is cut off or not JSON .*delete it and run",
    empty_folder: "no latent cache; make one with",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_broken_caches_are_named(cache, tmp_path, damage):
    folder = tmp_path / "cache"
    shutil.copytree(cache[0], folder)
    damage(folder)
    with pytest.raises(LatentError, match=BROKEN[damage]):
        for batch in itertools.islice(make_loader(latent_source(folder), global_batch_size=8, seed=0), 2):
            assert np.isfinite(batch["latents"]).all()


def test_a_cache_that_may_not_be_read_is_named(cache, tmp_path):
    shutil.copytree(cache[0], tmp_path / "cache")
    user = os.geteuid()
    tmp_path.chmod(0)
    if user == 0:  # root may read anything: become nobody
        os.seteuid(65534)
    try:
        with pytest.raises(LatentError, match="cache.* may not be read by this user: change its permissions"):
            latent_source(tmp_path / "cache")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_a_remade_shard_mends_the_cache(videos, cache, tmp_path):
    shutil.copytree(cache[0], tmp_path / "cache")
    first_shard(tmp_path / "cache").unlink()
    preparation.run(videos, tmp_path / "cache", encode, SETTINGS)
    assert contents(tmp_path / "cache") == contents(cache[0])


class Numbers:
    """Source whose example i is the number i."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"index": np.int64(index)}


def drawn(loader, batches: int) -> list[list[int]]:
    return [next(loader)["index"].tolist() for _ in range(batches)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_a_batch_are_the_same_whoever_reads_them(processes):
    whole = drawn(make_loader(Numbers(37), global_batch_size=8, seed=3), 12)
    parts = [
        drawn(make_loader(Numbers(37), global_batch_size=8, seed=3, rows=rows), 12)
        for rows in np.split(np.arange(8), processes)
    ]
    for k in range(12):
        assert sum((part[k] for part in parts), []) == whole[k]


def test_every_epoch_is_a_new_permutation():
    flat = sum(drawn(make_loader(Numbers(40), global_batch_size=8, seed=0), 10), [])
    assert sorted(flat[:40]) == sorted(flat[40:]) == list(range(40))
    assert flat[:40] != flat[40:] and flat[:40] != list(range(40))


@pytest.mark.parametrize("taken", [1, 3, 7])
def test_resume_is_exact(taken):
    def loader():
        double = lambda example: {"index": 2 * example["index"]}  # noqa: E731
        return make_loader(Numbers(20), global_batch_size=4, seed=1, transform=double, num_threads=3)

    first = loader()
    drawn(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    expected = drawn(first, 8)
    second = loader()
    second.set_state(state)
    assert drawn(second, 8) == expected


def test_impossible_loaders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the data has 3 clips, fewer than one batch"):
        make_loader(Numbers(3), global_batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"rows \[2, 4\] are not rows of a batch of 4"):
        make_loader(Numbers(30), global_batch_size=4, seed=0, rows=[2, 4])
    with pytest.raises(LatentError, match="no such folder"):
        latent_source(tmp_path / "absent")


def test_batches_of_a_cache(cache):
    batch = next(make_loader(latent_source(cache[0]), global_batch_size=4, seed=0))
    shapes = {"latents": (4, 4, 4, 6, 4), "cond_latent": (4, 4, 6, 4), "image_embed": (4, 24), "ids": (4, 3)}
    assert {name: value.shape for name, value in batch.items()} == shapes
    assert all(value.dtype == np.float32 for value in batch.values())


def test_world_source_needs_no_files():
    codec = PatchCodec(scaling_factor=0.5)
    source = world_source(World(), "heldout", 10, codec)
    frames, _ = World().clip(4, "heldout")
    example = source[4]
    assert len(source) == 10
    np.testing.assert_array_equal(codec.decode(example["latents"][None])[0], frames)
    np.testing.assert_array_equal(example["cond_latent"], example["latents"][0] / 0.5)
    np.testing.assert_array_equal(example["ids"], [6, 127, 0])
    batch = next(make_loader(source, global_batch_size=4, seed=0))
    assert jax.tree.map(np.shape, batch)["latents"] == (4, 8, 8, 8, 48)


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

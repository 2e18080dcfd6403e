"""Damaged latent caches are refused, with the file's name and the remedy."""

import itertools
import os
import shutil

import numpy as np
import pytest

from sfv_jax.data import latents, preparation
from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import latent_source, make_loader
from tests.support.small_cache import SETTINGS, contents, encode


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

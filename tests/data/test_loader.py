"""The loader shuffles, resumes and shards exactly."""

import json

import jax
import numpy as np
import pytest

from sfv_jax.data.latents import LatentError
from sfv_jax.data.loader import latent_source, make_loader, world_source
from sfv_jax.data.worlds import World
from sfv_jax.models.codec import PatchCodec


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

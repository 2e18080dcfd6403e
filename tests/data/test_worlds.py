"""The procedural world: clips are reproducible, stay in frame, and move as their labels specify."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from sfv_jax.config import world_of
from sfv_jax.data.worlds import SHAPES, World

WORLD = World()


def centroid(frames: np.ndarray, background) -> np.ndarray:
    """Returns the center of everything that is not background: `[t, 2]`, (x, y) in pixels."""
    weight = np.abs(frames.astype(float) - np.asarray(background)).sum(-1)
    grid = np.arange(frames.shape[1]) + 0.5
    total = weight.sum((1, 2))
    return np.stack([(weight * grid).sum((1, 2)), (weight * grid[:, None]).sum((1, 2))], -1) / total[:, None]


def test_clips_depend_on_seed_split_and_index_only():
    frames, label = WORLD.clip(7)
    again, same = World().clip(7)
    assert label == same and np.array_equal(frames, again)
    assert frames.shape == (8, 32, 32, 3) and frames.dtype == np.uint8
    batch, labels = WORLD.batch([3, 7], "train")
    assert np.array_equal(batch[1], frames) and labels[1] == label
    assert World(seed=1).label(7) != label


def test_splits_are_disjoint():
    train = {WORLD.label(i, "train") for i in range(500)}
    heldout = {WORLD.label(i, "heldout") for i in range(500)}
    assert len(train) == len(heldout) == 500 and not train & heldout
    with pytest.raises(ValueError, match="split"):
        WORLD.label(0, "test")


def test_futures_share_the_first_frame_and_differ_after_it():
    label = WORLD.label(11)
    futures = WORLD.futures(label)
    assert len(futures) == len(set(futures)) == 16 and label in futures
    clips = np.stack([WORLD.render(future) for future in futures])
    assert (clips[:, 0] == clips[0, 0]).all()
    assert len({clip[-1].tobytes() for clip in clips}) == 16


def test_shapes_stay_inside_and_the_centroid_follows_the_label():
    world = World(num_frames=40, speeds=(1.0, 2.0, 3.5))
    for index in range(60):
        frames, label = world.clip(index)
        background = world.backgrounds[label.background]
        positions = world.positions(label)
        low, high = world.bounds(label.radius)
        assert positions.min() >= low and positions.max() <= high
        assert np.abs(centroid(frames, background) - positions).max() < 0.2
        # The shape is never clipped: its area is constant up to the sampling of its edge.
        area = world.coverage(label).sum((1, 2))
        assert np.ptp(area) < 0.05 * area.mean() + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_bounce_reverses_the_motion(shape):
    label = dataclasses.replace(WORLD.label(0), shape=shape, radius=4.0, start=(24.5, 16.0), direction=0, speed=2.0)
    x, y = WORLD.positions(label).T
    np.testing.assert_allclose(x, [24.5, 26.5, 26.5, 24.5, 22.5, 20.5, 18.5, 16.5])
    np.testing.assert_allclose(y, 16.0)
    down = dataclasses.replace(label, direction=2)
    np.testing.assert_allclose(WORLD.positions(down)[1], [24.5, 18.0])


def test_a_run_finds_its_world_again():
    """The config in its workdir determines the world, although its tuples of tuples are lists of lists."""
    world = World(backgrounds=((1, 2, 3), (4, 5, 6)), speeds=(1.0,))
    stored = json.loads(json.dumps({"data": {"world": dataclasses.asdict(world)}}))
    found = world_of(ConfigDict(stored))
    assert found == world and hash(found) == hash(world)


def test_impossible_rules_are_refused():
    for rules in (
        {"size": 8},
        {"shapes": ("star",)},
        {"colours": ()},
        {"directions": 0},
        {"num_frames": 0},
        {"seed": -1},
        {"seed": 2**32},
    ):
        with pytest.raises(ValueError):
            World(**rules)

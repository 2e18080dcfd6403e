"""The procedural world: clips are reproducible, stay in frame, and move as their labels specify."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from sfv_jax.config import world_of
from sfv_jax.data.worlds import PALETTE, SHAPES, Body, Label, World
from sfv_jax.reproduction import experiments

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
        (body,) = label.bodies
        positions = world.positions(body)
        low, high = world.bounds(body.radius)
        assert positions.min() >= low and positions.max() <= high
        assert np.abs(centroid(frames, background) - positions).max() < 0.2
        # The shape is never clipped: its area is constant up to the sampling of its edge.
        area = world.coverage(body).sum((1, 2))
        assert np.ptp(area) < 0.05 * area.mean() + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_bounce_reverses_the_motion(shape):
    (body,) = WORLD.label(0).bodies
    body = dataclasses.replace(body, shape=shape, radius=4.0, start=(24.5, 16.0), direction=0, speed=2.0)
    x, y = WORLD.positions(body).T
    np.testing.assert_allclose(x, [24.5, 26.5, 26.5, 24.5, 22.5, 20.5, 18.5, 16.5])
    np.testing.assert_allclose(y, 16.0)
    down = dataclasses.replace(body, direction=2)
    np.testing.assert_allclose(WORLD.positions(down)[1], [24.5, 18.0])


SCENES = World(**experiments.VARIED)


def test_clips_of_plain_worlds_are_those_of_before():
    """Fields that came later leave the clips of a world without them as they were."""
    digest = hashlib.sha256()
    rules = dict(size=8, num_frames=4, shapes=("disc", "square"), directions=4, angle_offset=45.0, speeds=(1.0,))
    for changes in ({}, rules | dict(radii=(1.5, 2.0)), dict(size=16, num_frames=6, radii=(2.5, 3.5))):
        for split in ("train", "heldout"):
            digest.update(World(**changes).batch(range(200), split)[0].tobytes())
    assert digest.hexdigest() == "6831191af9b026709f2110de720cc06aa5b039f4f3bb5dd088ae2446a735deec"


def test_scenes_have_64_futures_that_share_the_first_frame():
    label = SCENES.label(3)
    futures, drawn = SCENES.futures(label), SCENES.render_futures(label)
    assert len(futures) == len(set(futures)) == len({clip.tobytes() for clip in drawn}) == 64 and label in futures
    assert (drawn[:, 0] == drawn[0, 0]).all()
    for n in (0, 21, 63):
        assert np.array_equal(drawn[n], SCENES.render(futures[n]))


def test_a_part_of_a_clip_is_what_the_whole_has_there():
    label = SCENES.label(5)
    assert np.array_equal(SCENES.render(label, slice(4, 7)), SCENES.render(label)[4:7])


def test_bodies_differ_in_color_and_begin_apart():
    labels = [SCENES.label(n) for n in range(300)]
    assert all(len({body.colour for body in label.bodies}) == 2 for label in labels)
    overlaps = [math.dist(a.start, b.start) < a.radius + b.radius for a, b in (label.bodies for label in labels)]
    assert np.mean(overlaps) < 0.04


def test_the_later_body_is_in_front():
    back, front = (
        Body("disc", "red", 6.0, (16.0, 16.0), 0, 1.2),
        Body("square", "blue", 4.0, (16.0, 16.0), 0, 1.2),
    )
    frames = dataclasses.replace(SCENES, shade=1.0).render(Label((back, front), 0))
    assert (frames[0, 16, 16] == PALETTE["blue"]).all() and (frames[0, 11, 16] == PALETTE["red"]).all()


def test_texture_drifts_in_the_direction_of_the_pan_and_wraps():
    """At one pixel per frame, each frame is the first one shifted around the frame."""
    world = dataclasses.replace(SCENES, pan_speed=1.0, bodies=1)
    label = dataclasses.replace(world.label(0), bodies=())
    for pan, (down, right) in enumerate([(0, 1), (1, 0), (0, -1), (-1, 0)]):
        frames = world.background(dataclasses.replace(label, pan=pan))
        for n in (1, 5):
            np.testing.assert_allclose(frames[n], np.roll(frames[0], (n * down, n * right), (0, 1)), atol=1e-3)
    amplitude = [world.background(world.label(n)).std((0, 1, 2)) for n in range(50)]
    assert np.sqrt(np.mean(np.square(amplitude))) == pytest.approx(world.texture, rel=0.05)


def test_bodies_roll_and_one_half_is_darker():
    """A body that moves to the right by pi radii has turned by half: the dark half is on the other side."""
    body = Body("disc", "yellow", 6.0, (10.0, 16.0), 0, 1.2, turn=0.0)
    coverage, tone = SCENES.stamp(body, np.array([(10.0, 16.0), (10.0 + 6.0 * np.pi, 16.0)]))
    assert tone.min() == pytest.approx(SCENES.shade) and tone.max() == 1
    for n, (dark, light) in enumerate(((slice(11, 15), slice(17, 21)), (slice(17, 21), slice(11, 15)))):
        np.testing.assert_allclose(tone[n, dark][coverage[n, dark] == 1], SCENES.shade, rtol=1e-6)
        np.testing.assert_allclose(tone[n, light][coverage[n, light] == 1], 1)


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
        {"bodies": 0},
        {"bodies": 7},
        {"shade": 1.5},
        {"pans": 0},
        {"finest": 1},
        {"bodies": 4},  # 65,536 futures
    ):
        with pytest.raises(ValueError):
            World(**rules)

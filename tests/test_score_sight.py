"""The damages of `tests/score_sight.py` are what their names say, and its redraws of truth are true."""

import numpy as np
import pytest

from sfv_jax.data.worlds import World
from tests import score_sight

WORLD = World(
    size=20,
    num_frames=5,
    directions=4,
    angle_offset=45.0,
    speeds=(1.5,),
    radii=(3.5, 4.5),
    bodies=2,
    texture=16.0,
    finest=2,
    pans=4,
    pan_speed=0.25,
)


@pytest.fixture(scope="module")
def damages():
    return score_sight.Damages(WORLD, 4)


def test_every_set_has_the_right_first_frames_and_differs_from_truth_behind_them(damages):
    sets = damages.all()
    assert len({clips.tobytes() for clips in sets.values()}) == len(sets) == score_sight.DRAWS + 12
    for name, clips in sets.items():
        assert clips.dtype == np.uint8 and clips.shape == damages.truth.shape
        np.testing.assert_array_equal(clips[:, 0], damages.reference[:, 0], name)
    futures = np.stack([WORLD.render_futures(label) for label in damages.labels])
    for name, clips in sets.items():
        legal = (futures == clips[:, None]).all((2, 3, 4, 5)).any(1)
        assert legal.all() if name.split()[0] == "truth" or name == "one direction" else not legal.any(), name
    np.testing.assert_array_equal(np.sort(sets["shuffled in time"], 1), np.sort(sets["truth"], 1))
    np.testing.assert_allclose(sets["smeared"], futures.mean(1), atol=0.51)


def test_the_changed_labels(damages):
    for label in damages.futures:
        alike, shaped, colored = damages.alike(label), damages.reshaped(label), damages.recolored(label)
        assert {body.direction for body in alike.bodies} == {alike.pan} == {0}
        for n, body in enumerate(label.bodies):
            assert shaped.bodies[n].shape != body.shape and shaped.bodies[n].colour == body.colour
            assert colored.bodies[n].shape == body.shape and damages.elsewhere(label).bodies[n].start != body.start
        assert len({body.colour for body in (*label.bodies, *colored.bodies)}) == 4


def test_redraws_take_one_of_each_clip_and_none_twice():
    several = np.arange(12).reshape(3, 4)
    a, b = score_sight.redraw(np.random.default_rng(0), several, 2)
    assert set(a % 4) == set(b % 4) == {0, 1, 2, 3} and not set(a) & set(b)
    assert len({tuple(score_sight.redraw(np.random.default_rng(n), several, 1)[0]) for n in range(9)}) > 4


def test_a_number_outside_the_range_of_truth_is_bold():
    scores = {"range": (1.0, 2.0), "inside": 2.0, "above": 2.1, "below": 0.5}
    assert [score_sight.cell(scores, name) for name in ("inside", "above", "below")] == ["2", "**2.1**", "**0.5**"]
    assert score_sight.cell(scores, "below", below=False) == "0.5"


def test_tables_of_measured_sets():
    """Sets like truth stay in its range, others are bold; kinds that a set lacks are left out."""
    rng, n = np.random.default_rng(0), 40

    def measured(shift):
        size = len(score_sight.CLIPWISE)
        return {
            "i3d": rng.normal(shift, 1, (n, 4)),
            "exact": rng.normal(shift, 1, (n, size)),
            "directions": (rng.integers(0, 4, (n, 2)) * (shift == 0)),
        }

    names = ("reference", "truth", "truth 2", "truth 3", "damaged")
    sets = {name: measured(3 * (name == "damaged")) for name in names}
    found = score_sight.scored(WORLD, sets, None)
    assert list(found) == ["distances", "exact"] and list(found["exact"])[-1] == "busiest"
    for scores in found.values():
        head, _, span, *rows = score_sight.table(scores).splitlines()
        assert [row.split(" | ")[0] for row in rows] == ["| truth", "| truth 2", "| truth 3", "| damaged"]
        assert rows[-1].count("**") == 2 * len(scores) and " to " in span
    assert found["exact"]["busiest"]["damaged"] == 1 > found["exact"]["busiest"]["truth"]
    x, y = sets["reference"]["i3d"], sets["damaged"]["i3d"]
    assert found["distances"]["pairs"]["damaged"] == pytest.approx(np.linalg.norm(x - y, axis=1).mean())
    assert found["exact"]["distance"]["truth"] == pytest.approx(sets["truth"]["exact"][:, 0].mean())


def test_stored_measurements_are_those_of_the_clips(tmp_path):
    path, calls = tmp_path / "set.npz", []

    def total(clips):
        calls.append(1)
        return clips.sum(1)

    ones = np.ones((2, 3), np.uint8)
    for clips, expected in ((ones, 3), (ones, 3), (2 * ones, 6)):
        assert (score_sight.kept(path, clips, {"total": total})["total"] == expected).all()
    assert len(calls) == 2
    found = score_sight.kept(path, 2 * ones, {"total": total, "more": lambda clips: {"first": clips[:, 0]}})
    assert len(calls) == 2 and (found["first"] == 2).all()

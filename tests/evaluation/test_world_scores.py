"""Scores in the world: each damage changes the score that is defined for it, and perfect clips score best."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sfv_jax.data.worlds import PALETTE, SHAPES, Body, Label, World
from sfv_jax.evaluation import scoring, worldnet
from sfv_jax.evaluation import world as scores
from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import Model, Options
from sfv_jax.evaluation.report import interval

WORLD = World(
    size=16, num_frames=6, directions=4, angle_offset=45.0, speeds=(1.5,), radii=(2.5, 3.5), shapes=("disc", "square")
)
SMALL = worldnet.Settings(clips=2048, steps=150)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return worldnet.load(WORLD, tmp_path_factory.mktemp("cache"), SMALL)


def blur(frames: np.ndarray) -> np.ndarray:
    soft = [np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(2))) for x in frames[1:]]
    return np.concatenate([frames[:1], soft])


def with_bodies(label, **changes):
    return dataclasses.replace(label, bodies=tuple(dataclasses.replace(body, **changes) for body in label.bodies))


@pytest.fixture(scope="module")
def found(network):
    """Returns `{damage: scores}` on 64 held-out first frames."""
    rng = np.random.default_rng(0)
    true, labels = WORLD.batch(range(64), "heldout")
    names = tuple(PALETTE)
    other = [with_bodies(x, colour=names[(names.index(x.bodies[0].colour) + 2) % len(names)]) for x in labels]
    one = [with_bodies(x, direction=0) for x in labels]
    flip = {"disc": "square", "square": "disc"}
    clips = {
        "perfect": true,
        "blurred": np.stack([blur(x) for x in true]),
        "frozen": np.repeat(true[:, :1], 6, axis=1),
        "shuffled": np.stack([x[np.r_[0, 1 + rng.permutation(5)]] for x in true]),
        "wrong colour": np.stack([np.r_[x[:1], WORLD.render(y)[1:]] for x, y in zip(true, other, strict=True)]),
        "wrong shape": np.stack(
            [
                np.r_[x[:1], WORLD.render(with_bodies(y, shape=flip[y.bodies[0].shape]))[1:]]
                for x, y in zip(true, labels, strict=True)
            ]
        ),
        "one direction": np.stack([WORLD.render(x) for x in one]),
    }
    return {name: scores.score(WORLD, labels, x, network=network) for name, x in clips.items()}


@pytest.mark.slow
def test_perfect_clips_score_perfectly(found):
    best = found["perfect"]
    assert best["distance"] == 0 and best["fit"] > 0.97 and best["path_error"] < 0.3
    assert best["legal"] == best["directions_covered"] == 1 and best["busiest_direction"] < 0.4
    assert best["shape_kept"] > 0.97 and best["colour_kept"] == 1 and best["clips"] == 64
    low, high = best["world_fvd_interval"]
    assert low < best["world_fvd"] < high
    assert set(scores.MEANINGS) <= set(best)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "score", "least"),
    [
        ("blurred", "fit", 0.05),
        ("blurred", "distance", -5),
        ("blurred", "intact", 0.6),
        ("blurred", "body_error", -4),
        ("frozen", "body_error", -2),
        ("shuffled", "body_error", -1.5),
        ("wrong colour", "intact", 0.7),
        ("wrong shape", "intact", 0.3),
        ("frozen", "path_error", -2),
        ("frozen", "legal", 0.9),
        ("shuffled", "path_error", -1.5),
        ("shuffled", "legal", 0.8),
        ("wrong colour", "colour_kept", 0.8),
        ("wrong shape", "shape_kept", 0.7),
        ("one direction", "directions_covered", 0.7),
        ("one direction", "busiest_direction", -0.6),
    ],
)
def test_each_damage_moves_its_score(found, damage, score, least):
    """The score drops by at least `least`, which is negative where less is better."""
    drop = found["perfect"][score] - found[damage][score]
    assert drop / least >= 1, (found["perfect"][score], found[damage][score])


@pytest.mark.slow
def test_scores_do_not_see_what_is_not_theirs(found):
    assert found["frozen"]["colour_kept"] == found["one direction"]["colour_kept"] == 1
    assert found["one direction"]["legal"] == 1 and found["one direction"]["distance"] == 0
    assert found["wrong colour"]["legal"] == 1 and found["shuffled"]["fit"] == pytest.approx(found["perfect"]["fit"])


@pytest.mark.slow
def test_world_fvd_orders_the_damages(found):
    fvd = {name: result["world_fvd"] for name, result in found.items()}
    for name in ("frozen", "shuffled", "wrong colour", "one direction"):
        assert 1.5 * fvd["perfect"] < fvd[name] < fvd["blurred"], fvd
    for name in ("blurred", "shuffled", "one direction"):  # beyond doubt with 64 clips
        assert found[name]["world_fvd_interval"][0] > found["perfect"]["world_fvd_interval"][1], name


def test_true_features_are_computed_once_for_all_models():
    """And anew for other first frames, or by another network."""
    counts = []

    def features(clips):
        counts.append(len(clips))
        return clips.mean((2, 3), dtype=np.float32).reshape(len(clips), -1)[:, :4]

    truth, labels = WORLD.batch(range(24), "heldout")
    futures = len(WORLD.futures(labels[0]))
    first = scores.world_fvd(WORLD, labels, truth, network=(features, {}), resamples=2)
    assert counts == [24, *24 * [futures]]
    assert scores.world_fvd(WORLD, labels, truth, network=(features, {}), resamples=2) == first
    assert counts[25:] == [24]
    scores.world_fvd(WORLD, labels[:20], truth[:20], network=(features, {}), resamples=2)
    assert counts[26:] == [20, *20 * [futures]]
    other = scores.world_fvd(WORLD, labels, truth, network=(lambda clips: 2 * features(clips), {}), resamples=2)
    assert other["world_fvd"] == pytest.approx(4 * first["world_fvd"], rel=1e-3)


@pytest.mark.slow
def test_the_network_is_kept_and_made_again_alike(network, tmp_path):
    _, about = network
    assert about["accuracy"]["colour"] > 0.9 and about["accuracy"]["direction"] > 0.6
    short = worldnet.Settings(clips=64, steps=2)
    first, second = (worldnet.load(WORLD, tmp_path / name, short)[1] for name in "ab")
    path = next((tmp_path / "a").iterdir())
    before = path.stat().st_mtime_ns
    again = worldnet.load(WORLD, tmp_path / "a", short)[1]
    assert path.stat().st_mtime_ns == before and again["sha256"] == first["sha256"]
    a, b = (np.load(next((tmp_path / name).iterdir())) for name in "ab")
    assert all(np.array_equal(a[k], b[k]) for k in a.files if k != "about") and second["accuracy"] == first["accuracy"]
    assert second["sha256"] == first["sha256"]
    changed = [dataclasses.replace(WORLD, seed=1), dataclasses.replace(WORLD, speeds=(1.0,))]
    assert len({worldnet.identity(w, short) for w in [WORLD, *changed]} | {worldnet.identity(WORLD, SMALL)}) == 4


@pytest.mark.slow
def test_a_checkpoint_on_the_world(network, tmp_path):
    def stand_still(images, *, seed, num_frames, **options):
        assert options["height"] == options["width"] == 16 and options["noise_aug_strength"] == 0
        return np.repeat(np.stack(images)[:, None], num_frames, axis=1)

    model = Model(stand_still, {"checkpoint": "still"}, Options(noise_aug_strength=0), batch_size=16)
    report = scoring.checkpoint_on_world(model, WORLD, tmp_path, n=24, network=network, shown=2)
    found = report.record["scores"]
    generated, still = (found[name] | {"network": None} for name in ("generated", "still image"))
    assert generated["legal"] == 0 and generated == still
    assert found["truth"]["distance"] == 0 and found["truth"]["legal"] == 1
    report.write(tmp_path)
    assert (tmp_path / "index.html").read_text().count("data:video/mp4") == 6
    assert f"| {interval(found['generated']['world_fvd_interval'])} |" in (tmp_path / "scores.md").read_text()


def test_a_checkpoint_on_a_world_without_a_network_but_with_features(tmp_path):
    """The features of all sets are computed once; truth is other futures than those of the real clips."""
    seen = []

    def means(clips):
        seen.append(len(clips))
        return clips.mean((2, 3)).reshape(len(clips), -1)

    world = dataclasses.replace(PAIR, size=16, radii=(2.5, 3.0), num_frames=4, shapes=("disc", "ring"))
    model = Model(lambda images, **_: np.repeat(np.stack(images)[:, None], 4, axis=1), {"checkpoint": "still"})
    extractor = Extractor(means, {"kind": "function"}, batch_size=20)
    reports = [scoring.checkpoint_on_world(model, world, tmp_path, n=20, extractor=extractor) for _ in range(2)]
    assert sum(seen) == 3 * 20  # the generated clips are still images
    record = reports[0].record
    assert record["pairs"] == reports[1].record["pairs"] and record["scores"]["truth"]["world_fvd"] is None
    pairs = {name: x["value"] for name, x in record["pairs"].items()}
    assert 0 < pairs["truth"] < pairs["generated"] == pairs["still image"]
    truth, still = record["scores"]["truth"], record["scores"]["generated"]
    assert truth["distance"] == 0 and truth["body_error"] < 0.6 < still["body_error"] and still["intact"] > 0.9
    reports[1].write(tmp_path)
    text = (tmp_path / "scores.md").read_text()
    assert "| body error |" in text and "distance of pairs" in text and "world fvd" not in text


def test_a_network_is_at_hand_if_it_is_cheap_or_stored(tmp_path):
    large = World(size=32, num_frames=14)
    assert worldnet.at_hand(WORLD, tmp_path) == tmp_path and worldnet.at_hand(large, tmp_path) is None
    (tmp_path / f"world-{worldnet.identity(large, worldnet.Settings())}.npz").touch()
    assert worldnet.at_hand(large, tmp_path) == tmp_path


PAIR = World(
    size=24,
    num_frames=5,
    directions=4,
    angle_offset=45.0,
    speeds=(2.0,),
    radii=(3.5, 4.5),
    bodies=2,
    texture=12.0,
    finest=2,
    pans=2,
    pan_speed=0.25,
)


def test_scores_order_truth_then_illegal_paths_then_a_smear():
    """The distance does not: a smear is nearer to the legal clips than any sharp clip on an illegal path."""
    turned = dataclasses.replace(PAIR, angle_offset=90.0)
    true, labels = PAIR.batch(range(12), "heldout")
    sets = {
        "truth": true,
        "another future": scores.redrawn(PAIR, labels, 1),
        "illegal path": np.stack([turned.render(label) for label in labels]),
        "smear": np.stack([PAIR.render_futures(label).mean(0).round().astype(np.uint8) for label in labels]),
    }
    found = {name: scores.score(PAIR, labels, clips) for name, clips in sets.items()}
    truth, other, illegal, smear = found.values()
    assert smear["distance"] < illegal["distance"]
    for one in (truth, other):
        assert one["intact"] > 0.97 and one["body_error"] < 0.6
    assert illegal["intact"] > 0.97 and 1 < illegal["body_error"] < smear["body_error"] - 1
    assert smear["intact"] < 0.6
    assert all(one["world_fvd"] is None for one in found.values())


def test_other_futures_are_legal_and_depend_on_the_seed():
    true, labels = PAIR.batch(range(4), "heldout")
    first, again, other = (scores.redrawn(PAIR, labels, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first, true)
    for label, clip in zip(labels, first, strict=True):
        assert (PAIR.render_futures(label) == clip).all((1, 2, 3, 4)).any()


def one_body(shape="disc", start=(10.0, 12.0), color="red", radius=4.0):
    return Body(shape, color, radius, start, 0, 0.0)


PLAIN = World(size=24, num_frames=1, bodies=2, radii=(3.0, 6.0))


def frame(*bodies):
    return PLAIN.render(Label(bodies, 0))


@pytest.mark.parametrize(("contrast", "intact"), [(1.0, True), (0.7, True), (0.52, False), (0.2, False)])
def test_a_body_that_has_faded_has_the_error_of_its_missing_contrast(contrast, intact):
    scene, behind = Label((one_body(),), 0), PLAIN.background(Label((), 0))
    frames = np.clip(behind + contrast * (PLAIN.render(scene) - behind), 0, 255).astype(np.uint8)
    found = scores.sight(PLAIN, scene, frames)[0]
    assert found.intact.item() == intact
    if contrast > 0.5:  # else it is best drawn where it is least visible
        assert found.positions[0].tolist() == [10.0, 12.0]
        np.testing.assert_allclose(found.error, (1 - contrast) ** 2, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_passes_for_another(shape):
    drawn = frame(one_body(shape, radius=6.0))
    for other in SHAPES:
        found = scores.sight(PLAIN, Label((one_body(other, radius=6.0),), 0), drawn)[0]
        assert found.intact.item() == (other == shape), (other, found.error)


def test_bodies_are_found_wherever_they_are_and_in_their_order():
    """The scene has them elsewhere, and the front one covers part of the other."""
    back, front = one_body(start=(9.0, 9.0)), one_body("square", (12.5, 11.0), "blue")
    scene = Label((one_body(start=(18.0, 18.0)), one_body("square", (5.0, 18.0), "blue")), 0)
    found = scores.sight(PLAIN, scene, frame(back, front))
    assert [x.positions[0].tolist() for x in found] == [[9.0, 9.0], [12.5, 11.0]]
    assert all(x.intact.item() and x.error.item() < 0.01 for x in found)


def test_a_body_that_is_gone_is_not_intact_behind_the_other():
    front = one_body("square", (12.5, 11.0), "blue", 6.0)
    found = scores.sight(PLAIN, Label((one_body(radius=3.0), front), 0), frame(front))
    assert [x.intact.item() for x in found] == [False, True]


def test_bodies_of_a_rolling_shaded_world_are_found():
    world = dataclasses.replace(PAIR, shade=0.55, rolling=True, pan_speed=0.6)
    for n in range(4):
        clip, label = world.clip(n, "heldout")
        for body, found in zip(label.bodies, scores.sight(world, label, clip), strict=True):
            assert found.intact.mean() > 0.7  # some are hidden
            away = np.linalg.norm(world.positions(body) - found.positions, axis=1)[found.intact]
            assert away.max() < 0.75


def test_the_error_of_a_body_in_pixels():
    """Against the definition: distance to the best legal path, half the side for a body that is not intact, no more."""
    world = World(size=40, num_frames=4, directions=2, speeds=(2.0,), radii=(3.0, 4.0))
    body = Body("disc", "red", 3.0, (20.0, 20.0), 0, 2.0)
    right = np.array([[20.0, 20], [22, 20], [24, 20], [26, 20]])
    left = np.array([[20.0, 20], [18, 20], [16, 20], [14, 20]])
    cases = [
        (right, (1, 1, 1, 1), 0),
        (left, (1, 1, 1, 1), 0),
        (right + [0, 3], (1, 1, 1, 1), 3),
        (right, (1, 1, 0, 1), 20 / 4),
        (right, (0, 0, 0, 0), 20),
        (right + [0, 90], (1, 1, 1, 1), 20),
        (np.concatenate([right[:3], left[3:]]), (1, 1, 1, 1), 12 / 4),
    ]
    for positions, intact, expected in cases:
        found = scores.Sighting(positions, np.zeros(4), np.array(intact, bool))
        assert scores.body_error(world, body, found) == pytest.approx(expected)


QUICK = worldnet.Settings(widths=(4, 4), features=4, clips=64, steps=1)
TINY = World(size=8, num_frames=2, directions=4, angle_offset=45.0, speeds=(1.5,), radii=(1.5, 2.5))


def changed(path, change) -> None:
    """Writes the arrays of `path` again, changed by a function."""
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


def zero(arrays) -> None:
    arrays.update({name: np.zeros_like(x) for name, x in arrays.items() if name != "about"})


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("hello"),
    "a bare array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "a pickle": lambda path: np.save(path.open("wb"), np.array([{}]), allow_pickle=True),
    "a flipped bit": lambda path: changed(path, lambda x: x["conv1.kernel"].view(np.uint8).flat.__setitem__(9, 77)),
    "arrays of zeros": lambda path: changed(path, zero),
    "an array less": lambda path: changed(path, lambda x: x.pop("conv1.bias")),
    "another accuracy": lambda path: changed(path, lambda x: x.update(about=str(x["about"]).replace("0.", "0.9"))),
    "no description": lambda path: changed(path, lambda x: x.pop("about")),
    "a list as description": lambda path: changed(path, lambda x: x.update(about="[]")),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Returns the file of a tiny network and its description."""
    folder = tmp_path_factory.mktemp("stored")
    about = worldnet.load(TINY, folder, QUICK)[1]
    return next(folder.iterdir()), about


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_network_is_made_again(stored, tmp_path, capsys, monkeypatch, damage):
    kept, about = stored
    path = tmp_path / kept.name
    path.write_bytes(kept.read_bytes())
    DAMAGES[damage](path)
    with np.load(kept) as file:
        params = worldnet.tree.unflatten({name: file[name] for name in file.files if name not in ("about", "scale")})
        scale = file["scale"]
    monkeypatch.setattr(worldnet, "train", lambda world, settings: (params, scale, about["accuracy"]))
    found = worldnet.load(TINY, tmp_path, QUICK)[1]
    said = capsys.readouterr().err
    assert said.startswith(f"{path} ") and "; it is made again; " in said and said.count("\n") == 1
    assert found["sha256"] == about["sha256"]
    monkeypatch.setattr(worldnet, "train", None)
    assert worldnet.load(TINY, tmp_path, QUICK)[1]["sha256"] == about["sha256"]


@pytest.mark.parametrize(
    "other", [(dataclasses.replace(TINY, seed=1), QUICK), (TINY, dataclasses.replace(QUICK, seed=1))]
)
def test_the_network_of_another_world_or_training_is_not_used(stored, tmp_path, monkeypatch, other):
    (tmp_path / f"world-{worldnet.identity(*other)}.npz").write_bytes(stored[0].read_bytes())
    monkeypatch.setattr(worldnet, "train", lambda world, settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worldnet.load(other[0], tmp_path, other[1])


def test_a_network_that_classifies_differently_is_made_again(stored, tmp_path, capsys, monkeypatch):
    """Whatever its checksums: as one of zeros that somebody stored with them."""
    kept, about = stored
    with np.load(kept) as file:
        arrays = {name: np.zeros_like(x) for name, x in file.items() if name != "about"}
    forged = about["accuracy"] | {"shape": 0.9}
    digest = worldnet._digest(TINY, QUICK, arrays, forged)
    description = {"accuracy": forged, "sha256": digest, "seconds": 1.0}
    np.savez(tmp_path / kept.name, about=json.dumps(description), **arrays)
    monkeypatch.setattr(worldnet, "train", lambda world, settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worldnet.load(TINY, tmp_path, QUICK)
    assert f"{tmp_path / kept.name} has accuracy" in capsys.readouterr().err


def test_refusals():
    _, labels = WORLD.batch(range(2))
    with pytest.raises(ValueError, match=r"2 labels need clips uint8 \(2, 6, 16, 16, 3\); got uint8 \(2, 5"):
        scores.score(WORLD, labels, np.zeros((2, 5, 16, 16, 3), np.uint8))
    assert scores.score(WORLD, labels, np.zeros((2, 6, 16, 16, 3), np.uint8))["world_fvd"] is None

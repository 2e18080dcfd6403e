"""From a request to videos and records, with small models of the procedural world."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sfv_jax.checkpoints import base
from sfv_jax.choices import PACKAGED
from sfv_jax.data.images import read_image
from sfv_jax.data.video import read_clip, read_comment
from sfv_jax.data.worlds import World
from sfv_jax.errors import UserError
from sfv_jax.runtime.files import sha256
from sfv_jax.sampling import Sampler
from sfv_jax.web import models
from sfv_jax.web.generation import generate
from sfv_jax.web.request import Limits, RequestError
from sfv_jax.web.sessions import SessionEnded, Sessions
from sfv_jax.web.turns import Cancelled, Job
from sfv_jax.web.uploads import receive
from tests.support.small_model import CONFIG, WORLD, save_world_model
from tests.web.test_sessions import encoded


@pytest.fixture
def session(tmp_path):
    sessions = Sessions(Limits(), tmp_path)
    yield sessions.begin()
    sessions.close()


def made(small, session, request, stop=lambda event: False) -> list[dict]:
    """Events of a generation; it is cancelled by an event for which `stop` is true."""
    events = []

    def emit(event):
        events.append(event)
        if stop(event):
            job.cancel()

    job = Job(lambda job: None, emit)
    try:
        generate(small, session, request, Limits(), job)
    except Cancelled:
        events.append({"event": "cancelled"})
    return events


def test_a_video_of_an_example_and_its_record(small, small_folder, session):
    asked = replace(small.defaults, example=2, seed=7, fps=10.0)
    events = made(small, session, asked)
    kinds = [event["event"] for event in events]
    assert kinds == ["begin", *["stage"] * 4, *["frame"] * 3, "video"]
    assert [event["name"] for event in events if event["event"] == "stage"] == [
        "image encoder",
        "VAE encoder",
        "UNet",
        "decoder",
    ]
    assert events[0]["title"] == "small, seed 7" and (events[0]["frames"], events[0]["fps"]) == (3, 10.0)
    video = events[-1]
    assert video["times"].keys() == {"image encoder", "VAE encoder", "UNet", "decoder", "files"}
    path = session.file(video["name"])
    record = json.loads(session.file(video["record"]).read_text())
    assert json.loads(read_comment(path)).items() <= record.items() and record["video_sha256"] == sha256(path)
    assert (record["image"], record["checkpoint"], record["seed"]) == ("heldout-2.png", str(small_folder), 7)
    assert record["num_frames"] == 3 and record["times"].keys() == {"clip", "encode", "denoise", "decode"}
    assert str(session.folder) not in json.dumps(record)

    # The record makes the same video again, and its image is that which the world draws.
    image = small.examples[2]
    np.testing.assert_array_equal(image, World(**WORLD).clip(2, "heldout")[0][0])
    names = ("seed", "steps", "sampler", "height", "width", "fit", "fps", "motion_bucket_id", "noise_aug_strength")
    frames = Sampler.load(record["checkpoint"])([image], **{name: record[name] for name in names})[0]
    sent = [np.asarray(Image.open(_file(event["url"]))) for event in events if event["event"] == "frame"]
    np.testing.assert_array_equal(sent, frames)
    assert read_clip(path, num_frames=3, fps=10).shape == frames.shape


def _file(url: str):
    import base64
    import io

    return io.BytesIO(base64.b64decode(url.partition(",")[2]))


def test_an_uploaded_image_is_fitted(small, session):
    receive(session, "Cat 1.jpg", encoded("JPEG", (50, 20)), Limits())
    asked = replace(small.defaults, example=None, fit="pad")
    events = made(small, session, asked)
    assert events[-1]["name"] == "Cat-1-seed0-2.mp4"
    record = json.loads(session.file(events[-1]["record"]).read_text())
    assert (record["image"], record["fit"], record["height"], record["width"]) == ("Cat-1.jpg", "pad", 16, 16)
    pixels = read_image(session.image)
    first = next(small.main.first.stream(pixels, height=16, width=16, fit="pad", noise_aug_strength=0.0))
    np.testing.assert_array_equal(np.asarray(Image.open(_file(events[5]["url"]))), first)


@pytest.mark.parametrize("beside", ["seed", "checkpoint"])
def test_two_videos_side_by_side(small, session, beside):
    asked = replace(small.defaults, beside=beside, seed=3, second_seed=5, num_inference_steps=2)
    events = made(small, session, asked)
    titles = [event["title"] for event in events if event["event"] == "begin"]
    assert titles == ["small, seed 3", {"seed": "small, seed 5", "checkpoint": "other, seed 3"}[beside]]
    frames = [[event["url"] for event in events if event["event"] == "frame" and event["side"] == n] for n in (0, 1)]
    assert len(frames[0]) == len(frames[1]) == 3 and frames[0] != frames[1]
    progress = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    assert progress == [(1, 2), (2, 2)] * 2
    assert len(session.videos) == 2


def test_what_cannot_be_made_is_a_sentence(small, session):
    with pytest.raises(RequestError, match="There is no image yet: drop one or choose an example."):
        made(small, session, replace(small.defaults, example=None))
    with pytest.raises(UserError, match="in 1 to 3 steps, got 9"):
        made(small, session, replace(small.defaults, sampler="sfv", num_inference_steps=9))
    with pytest.raises(UserError, match="one end must exceed 1"):
        made(small, session, replace(small.defaults, min_guidance_scale=0.5, max_guidance_scale=0.5))
    assert session.videos == []


@pytest.mark.parametrize("kind", ["begin", "stage", "progress", "frame"])
def test_a_stopped_generation_leaves_no_video(small, session, kind):
    asked = replace(small.defaults, num_inference_steps=2)
    events = made(small, session, asked, lambda event: event["event"] == kind)
    assert events[-1] == {"event": "cancelled"} and not list(session.folder.glob("*.mp4"))
    assert sum(event["event"] == kind for event in events) == 1


def test_a_page_closed_meanwhile_leaves_no_file(small, session):
    def closed(event):
        if event["event"] == "frame":
            session.end()
        return False

    with pytest.raises(SessionEnded):
        made(small, session, small.defaults, closed)
    assert not session.folder.exists()


def test_sizes(small, tmp_path):
    """A world has its size; else the image's shape counts, up to the area that the UNet is described with."""
    assert small.size(1000, 500) == (16, 16)
    free = models.make(models.load(str(save_world_model(tmp_path / "free", config=None))))
    assert free.size(12, 9) == (12, 8) and free.size(4000, 1000) == (32, 8) and free.size(1, 9000) == (4, 64)
    assert free.examples == [] and free.defaults.example is None and free.defaults.noise_aug_strength == 0.02
    assert models.make(free.main, height=24).size(1000, 1000) == (24, 16)
    with pytest.raises(UserError, match="height 18 is not a multiple of 4"):
        models.make(free.main, height=18)


def test_defaults_follow_the_training(small):
    assert small.defaults.example == 0 and small.defaults.num_inference_steps == 1
    teacher = replace(small.main, config=CONFIG | {"method": "teacher"})
    assert models.make(teacher).defaults.num_inference_steps == 25
    other = replace(small.main, config={"method": "teacher", "data": {"source": "cache"}})
    assert models.make(other).defaults.guidance == (1.0, 3.0)
    for broken in ({"source": "world"}, {"source": "world", "world": {"size": -1}}, []):
        assert models.world_behind({"data": broken}) is None


def test_two_models_of_one_name_are_told_apart_by_their_paths(small):
    same = replace(small.other, checkpoint="runs/a/small")
    assert [models.make(small.main, same).title(other) for other in (False, True)] == [
        small.main.checkpoint,
        "runs/a/small",
    ]
    assert [small.title(other) for other in (False, True)] == ["small", "other"]


def test_a_model_folder_tells_its_world_by_its_run_or_its_source():
    source = {"source": {"world": WORLD}}
    for meta in ({"run": {"config": CONFIG}}, source, source | {"run": {"config": {"method": "sfv"}}}):
        assert models.world_behind(base.exported_config(meta)).size == WORLD["size"]
    assert base.exported_config({"run": 3, "source": []}) == {}


def test_models_of_different_kinds_are_not_compared(small, model_folder):
    with pytest.raises(UserError, match="make videos of different kinds"):
        models.make(small.main, models.load(str(model_folder)))


def test_models_in_the_package_have_names():
    assert base.training_config(PACKAGED[0])["data"]["source"] == "world"

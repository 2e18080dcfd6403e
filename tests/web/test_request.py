"""Requests of a page: what is refused, with which sentence, and what the sampler gets."""

import json

import pytest

from sfv_jax import choices
from sfv_jax.sampling import files
from sfv_jax.web.request import BESIDE, NUMBERS, Offer, Request, RequestError, parse

OFFER = Offer(decoders=("full", "tiny"), examples=3, compare=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "The request is no JSON object."),
        ({"sede": 1}, "There is no setting 'sede'."),
        ({"seed": -1}, "seed: give a whole number from 0 to 4294967295."),
        ({"seed": 1.5}, "seed: give a whole number"),
        ({"seed": True}, "seed: give a whole number"),
        ({"seed": None}, "seed: give a whole number"),
        ({"seed": "1"}, "seed: give a whole number"),
        ({"seed": 2**32}, "seed: give a whole number"),
        ({"seed": float("inf")}, "seed: give a whole number"),
        ({"fps": float("nan")}, "fps: give a number from 1 to 120."),
        ({"fps": 0}, "fps: give a number"),
        ({"motion_bucket_id": 5000}, "motion_bucket_id: give a number from 0 to 1023."),
        ({"noise_aug_strength": -0.1}, "noise_aug_strength: give a number from 0 to 10."),
        ({"num_inference_steps": 101}, "num_inference_steps: give a whole number from 1 to 100."),
        ({"min_guidance_scale": 1}, "Guidance needs both"),
        ({"min_guidance_scale": 1, "max_guidance_scale": 99}, "max_guidance_scale: give a number from 0 to 20."),
        ({"sampler": "ddim"}, "sampler: choose one of euler, sfv, sfv_euler, animatelcm."),
        ({"fit": ["crop"]}, "fit: choose one of crop, pad, stretch."),
        ({"decoder": "/etc/passwd"}, "decoder: choose one of full, tiny."),
        ({"beside": "both"}, "beside: choose one of nothing, seed, checkpoint."),
        ({"example": 3}, "example: give a whole number from 0 to 2."),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(content, message):
    with pytest.raises(RequestError) as caught:
        parse(content, OFFER, Request())
    assert str(caught.value).startswith(message) and str(caught.value).endswith(".")


def test_what_is_not_offered_is_refused():
    with pytest.raises(RequestError, match="no examples"):
        parse({"example": 0}, Offer(), Request())
    with pytest.raises(RequestError, match="beside: choose one of nothing, seed\\."):
        parse({"beside": "checkpoint"}, Offer(), Request())


def test_a_request_has_the_defaults_of_its_page_and_what_it_changes():
    asked = parse(json.loads('{"seed": 5.0, "fps": 8, "example": null}'), OFFER, Request(example=0, fit="pad"))
    assert (asked.seed, asked.fps, asked.example, asked.fit) == (5, 8.0, None, "pad")
    assert type(asked.seed) is int and type(asked.fps) is float
    assert parse({}, OFFER, Request(example=1)) == Request(example=1)


def test_two_videos_side_by_side():
    assert Request(seed=4).sides == [(False, 4)]
    assert Request(seed=4, second_seed=9, beside="seed").sides == [(False, 4), (False, 9)]
    assert Request(seed=4, second_seed=9, beside="checkpoint").sides == [(False, 4), (True, 4)]


def test_options_are_those_of_the_sampler():
    """Every option of a page is one that `sample` records under the same name, so that a record makes it again."""
    asked = Request(min_guidance_scale=1, max_guidance_scale=3)
    options = asked.options(7, (64, 96))
    assert options["guidance"] == (1, 3) and (options["height"], options["width"], options["seed"]) == (64, 96, 7)
    assert options.keys() <= {*files.OPTIONS, "seed", "guidance"}


def test_ranges_contain_the_defaults():
    for name, (kind, least, most) in NUMBERS.items():
        value = getattr(Request(), name)
        assert value is None or (isinstance(value, kind) and least <= value <= most)
    assert Request().sampler in choices.SAMPLERS and Request().fit in choices.FITS and Request().beside in BESIDE

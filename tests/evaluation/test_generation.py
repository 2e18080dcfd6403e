"""Generated clips are lossless, resumed and known by their settings."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.video import VideoError
from sfv_jax.errors import UserError
from sfv_jax.evaluation import request
from sfv_jax.evaluation.generation import Model, Options, generate, read_strip
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.runtime.files import write_json
from tests.support.small_clips import SMALL, echo


def test_generated_clips_are_lossless_and_resumed(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (25, 24, 32, 3), dtype=np.uint8)
    protocol, names, calls = (
        Protocol(n=25, seed=3, **SMALL | dict(height=24, width=32)),
        [f"a/{n}" for n in range(25)],
        [],
    )
    model = Model(partial(echo, calls=calls), {"checkpoint": "x"}, Options(steps=6), batch_size=4)
    files = generate(model, names, lambda n: images[n], tmp_path, protocol)
    assert calls[0] == [3, 4, 5, 6] and calls[-1] == [27] * 4 and len(calls) == 7
    assert (read_strip(files[7], 14) == images[7] + 5).all()
    files[7].unlink()
    generate(model, names, lambda n: images[n], tmp_path, protocol)
    assert calls[7:] == [[10] * 4] and (read_strip(files[7], 14) == images[7] + 5).all()
    for changed, other in (
        ("checkpoint is x there, y here", dict(model=dataclasses.replace(model, origin={"checkpoint": "y"}))),
        ("steps is 6 there, 2 here", dict(model=dataclasses.replace(model, options=Options(steps=2)))),
        ("clips is .* there", dict(names=names[::-1])),
        ("filter is bilinear there, box here", dict(protocol=dataclasses.replace(protocol, filter="box"))),
    ):
        now = dict(model=model, names=names, image=lambda n: images[n], folder=tmp_path, protocol=protocol) | other
        with pytest.raises(VideoError, match=f"made differently: {changed}.*Use another --out"):
            generate(**now)


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 9999, '{"clips": 3, "seeds": []}', '{"seeds": []}', '{"clips": null}']
)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    model = Model(echo, {"checkpoint": "x"}, Options())
    with pytest.raises(UserError, match=f"manifest.json cannot be used: .*; use another --out, or remove {tmp_path}"):
        generate(model, ["a"], lambda n: np.zeros((24, 32, 3), np.uint8), tmp_path, Protocol(n=0, **SMALL))


def test_seeds_that_count_beyond_the_last_are_refused_before_the_work(tmp_path):
    message = "--seed=4294967290: 20 videos have the seeds from it on, and the last seed is 4294967295"
    with pytest.raises(UserError, match=message):
        generate(
            Model(None, {}, Options()), [str(n) for n in range(20)], None, tmp_path, Protocol(n=20, seed=2**32 - 6)
        )
    asked = request.Request(
        tmp_path, checkpoint="c", dataset="world", flow=False, protocol=Protocol(n=20, seed=2**32 - 6)
    )
    with pytest.raises(UserError, match=message):
        request.run(asked)


def test_manifests_have_the_keys_of_earlier_versions(tmp_path):
    """Clips of an earlier version are reused only if the content of the manifest is the same, byte for byte."""
    protocol = Protocol(n=0, **SMALL | dict(height=24, width=32))
    options = Options(4, "sfv", 127.0, 0.02, None, (1.0, 3.0))
    model = Model(echo, {"checkpoint": "x", "step": None}, options).on(dataset="d", source={"form": "video files"})
    generate(model, ["a/0"], lambda n: np.zeros((24, 32, 3), np.uint8), tmp_path, protocol)
    expected = {
        "protocol": {
            "seed": 0,
            "num_frames": 14,
            "fps": 7.0,
            "height": 24,
            "width": 32,
            "score_height": 24,
            "score_width": 32,
            "crop": "none",
            "filter": "bilinear",
        },
        "options": {
            "steps": 4,
            "sampler": "sfv",
            "motion_bucket_id": 127.0,
            "noise_aug_strength": 0.02,
            "decode_chunk_size": None,
            "guidance": [1.0, 3.0],
        },
        "origin": {"checkpoint": "x", "step": None, "dataset": "d", "source": {"form": "video files"}},
        "clips": ["a--0"],
        "seeds": [0],
    }
    write_json(tmp_path / "expected.json", expected)
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_more_clips_continue_those_there_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (30, 24, 32, 3), dtype=np.uint8)
    calls, names = [], [f"{n}" for n in range(30)]
    model = Model(partial(echo, calls=calls), {"checkpoint": "x"}, batch_size=5)

    def run(n: int, ddof: int) -> list[Path]:
        protocol = Protocol(n=n, ddof=ddof, **SMALL | dict(height=24, width=32))
        return generate(model, names[:n], lambda k: images[k], tmp_path, protocol)

    run(20, 0)
    assert len(run(30, 1)) == 30 and len(calls) == 6 and calls[4] == [20, 21, 22, 23, 24]
    assert len(run(20, 0)) == 20 and len(calls) == 6
    assert len(json.loads((tmp_path / "manifest.json").read_text())["clips"]) == 30

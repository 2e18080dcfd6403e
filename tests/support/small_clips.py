"""Small clips and features for tests of evaluation."""

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest

from sfv_jax.evaluation.features import Extractor
from sfv_jax.evaluation.generation import Options
from sfv_jax.evaluation.protocol import Protocol

USABLE, SHORT = 22, 2
SMALL = dict(height=64, width=96, score_height=24, score_width=32)
FUNCTION = """
import numpy as np
def mean_and_motion(x):
    x = x.astype(np.float32)
    return np.concatenate([x.mean((1, 2, 3)), np.abs(np.diff(x, axis=1)).mean((1, 2, 3))], -1)
"""
ABOUT = {"kind": "function", "function": "test"}


def colors(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return np.concatenate([x.mean((1, 2, 3)), np.abs(np.diff(x, axis=1)).mean((1, 2, 3))], -1)


COLORS = Extractor(colors, ABOUT)
UNUSED = Extractor(lambda x: pytest.fail("clips were read"), ABOUT)  # for what is refused at once


def write_avi(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def echo(images, *, seed, num_frames, height, width, fps, calls=None, **options):
    """A sampler that repeats its images, brighter by `steps` - 1."""
    assert options.keys() == {field.name for field in dataclasses.fields(Options)}
    if calls is not None:
        calls.append(list(seed))
    picture = [np.asarray(Protocol(score_height=height, score_width=width).score(image[None])) for image in images]
    return np.concatenate([np.repeat(x, num_frames, 0)[None] for x in picture]) + np.uint8(options["steps"] - 1)

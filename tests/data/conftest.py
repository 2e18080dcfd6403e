"""Fixtures of a folder of videos and of its latent cache."""

import pytest

from sfv_jax.data import preparation
from sfv_jax.data.video import write_video
from sfv_jax.data.worlds import World
from tests.support.small_cache import SETTINGS, WORLD, encode


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight usable videos of 1.14 s and four unusable ones."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(8):
        frames, _ = World(size=48, num_frames=8).clip(index)
        write_video(folder / f"{index % 2}" / f"clip{index}.mp4", frames)
    write_video(folder / "short.mp4", WORLD.clip(0)[0][:3])
    (folder / "0" / "broken.mp4").write_bytes((folder / "0" / "clip0.mp4").read_bytes()[:900])
    (folder / "text.mp4").write_text("not a video")
    (folder / "1" / "empty.mkv").touch()
    return folder


@pytest.fixture(scope="module")
def cache(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    return out, preparation.run(videos, out, encode, SETTINGS)

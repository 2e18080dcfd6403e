"""Fixture of a small UCF-101."""

from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.worlds import World
from sfv_jax.evaluation.clips import Dataset, find_clips
from tests.support.small_clips import SHORT, USABLE, write_avi


@pytest.fixture(scope="module")
def ucf(tmp_path_factory) -> Path:
    """Videos of 64x48 at 25 fps in class folders; the test list names 22 of 2 s and 2 of 1 s, the train list one."""
    root, world, listed = tmp_path_factory.mktemp("ucf"), World(size=48, num_frames=50, radii=(4.0, 8.0)), []
    for n in range(USABLE + SHORT + 1):
        kind = ("Archery", "Bowling")[n % 2]
        name = f"{kind}/v_{kind}_g{n:02d}_c01.avi"
        square = world.clip(n)[0][: 25 if n in (3, 8) else 50]
        write_avi(root / "UCF-101" / name, np.pad(square, ((0, 0), (0, 0), (8, 8), (0, 0)), mode="edge"))
        listed.append(name)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text("\n".join(listed[:-1]) + "\n")
    (lists / "trainlist01.txt").write_text(f"{listed[-1]} 1\n")
    return root


@pytest.fixture(scope="module")
def dataset(ucf) -> Dataset:
    return Dataset([c for c in find_clips(ucf / "UCF-101") if "g24" not in c.name], "fake")

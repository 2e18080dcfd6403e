"""The golden files equal the results of the torch reference today."""

import json

import numpy as np
import pytest

from tests.support import golden


@pytest.mark.slow
def test_stored_files_equal_a_fresh_run(reference):
    fresh = golden.fresh()
    assert sorted(fresh) == sorted(path.stem for path in golden.FOLDER.iterdir())
    for name, arrays in fresh.items():
        stored = golden.load(name)
        assert stored.keys() == arrays.keys()
        for key, values in arrays.items():
            np.testing.assert_array_equal(stored[key].shape, values.shape)
            # Another machine's float64 may round a pipeline's latents, up to 700, to the next float32.
            assert golden.distance(stored[key], values) <= (1e-5 if name == "pipeline" else 1e-6), (name, key)


def test_files_are_small_and_name_their_writers():
    files = list(golden.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        with np.load(path) as file:
            assert {"diffusers", "torch"} <= set(json.loads(str(file["versions"])))

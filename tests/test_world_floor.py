"""The best prediction in the procedural world, against cases with known answers."""

import numpy as np

from tests.world_floor import best


def test_the_posterior_mean_of_known_futures():
    futures = np.array([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 4.0]]])
    np.testing.assert_allclose(best(np.array([[9.0, -7.0]]), futures, 1e6), futures.mean(0), rtol=1e-4)  # no evidence
    np.testing.assert_allclose(best(np.array([[1.9, 0.1]]), futures, 0.1), futures[1], atol=1e-12)  # no doubt
    # Between the first two, at squared distances 1 and 1, and 17 to the third, with sigma^2 = 4.
    weights = np.exp(-np.array([1, 1, 17]) / 8)
    expected = (weights[:, None, None] * futures).sum(0) / weights.sum()
    np.testing.assert_allclose(best(np.array([[1.0, 0.0]]), futures, 2.0), expected, rtol=1e-12)

"""MMD and the distance of pairs against statements by loops, and their intervals against repeated draws."""

import numpy as np
import pytest

from sfv_jax.errors import UserError
from sfv_jax.evaluation import mmd


def loops(x, y, paired: bool) -> float:
    """Returns 100 times the unbiased squared MMD, term by term as it is defined."""
    kernel = lambda a, b: (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a)) ** 2  # noqa: E731
    own = sum(
        sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    )
    cross = [kernel(x[i], y[j]) for i in range(len(x)) for j in range(len(y)) if not (paired and i == j)]
    return 100 * (own - 2 * sum(cross) / len(cross))


@pytest.mark.parametrize("d", [3, 30])  # fewer and more than rows
def test_mmd_is_its_definition(d):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, d)), 1.5 * rng.standard_normal((7, d)) + 0.3
    assert mmd.squared_mmd(x, y) == pytest.approx(loops(x, y, False), rel=1e-12)
    assert mmd.squared_mmd(x, y[:5]) == pytest.approx(loops(x, y[:5], False), rel=1e-12)
    assert mmd.squared_mmd(x, y, paired=True) == pytest.approx(loops(x, y, True), rel=1e-12)
    assert mmd.squared_mmd(x, x, paired=True) == pytest.approx(0, abs=1e-12)


def test_mmd_does_not_depend_on_n_and_is_zero_on_average():
    """The truth for Gaussians is 100 |A - B|^2 / d^2 with second moments A and B."""
    rng, d = np.random.default_rng(1), 4
    truth = 100 * d * (1.5**2 - 1) ** 2 / d**2
    for n in (5, 40):
        draws = np.array([rng.standard_normal((2, n, d)) for _ in range(2000)])
        same = np.array([mmd.squared_mmd(x, y) for x, y in draws])
        other = np.array([mmd.squared_mmd(x, 1.5 * y) for x, y in draws])
        related = np.array([mmd.squared_mmd(x, 1.5 * (0.8 * x + 0.6 * y), paired=True) for x, y in draws])
        for values, expected in ((same, 0), (other, truth), (related, truth)):
            assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(draws))


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_of_mmd_have_the_width_of_its_scatter(paired):
    rng, n = np.random.default_rng(2), 21

    def draw():
        x, y = rng.standard_normal((2, n, 4))
        return x, 2 + (0.9 * x + 0.3 * y if paired else y)

    values = [mmd.squared_mmd(*draw(), paired=paired) for _ in range(400)]
    found = [mmd.measure_mmd(*draw(), paired=paired, seed=k).interval for k in range(40)]
    width = np.mean([high - low for low, high in found])
    low, high = np.percentile(values, [2.5, 97.5])
    assert 0.8 < width / (high - low) < 1.25
    truth = np.mean(values)
    assert sum(low < truth < high for low, high in found) >= 34


def test_mean_of_pairs():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 9, 5))
    distances = mmd.pair_distances(x, y)
    expected = [
        sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5 for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(distances, expected, rtol=1e-12)
    found = mmd.measure_pairs(distances)
    assert found.value == pytest.approx(sum(expected) / 9) and found.n == 9
    assert found == mmd.measure_pairs(distances) and found.interval[0] < found.value < found.interval[1]
    draws = rng.standard_normal((300, 9))
    width = np.mean([np.subtract(*mmd.measure_pairs(x, resamples=200).interval[::-1]) for x in draws])
    assert width == pytest.approx(2 * 1.96 * draws.std() / 3, rel=0.08)  # 0.94 of this for resamples of 9


def test_too_few_and_unequal_sets_are_refused():
    x = np.zeros((6, 2))
    for call, message in (
        (lambda: mmd.measure_mmd(x[:4], x[:4]), "at least 5; got 4 and 4"),
        (lambda: mmd.measure_mmd(x, x[:5]), "same number of samples, at least 5; got 6 and 5"),
        (lambda: mmd.measure_pairs(np.ones(4)), "at least 5; got 4"),
        (lambda: mmd.measure_pairs(np.full(6, np.nan)), "not finite"),
        (lambda: mmd.measure_mmd(x, np.full((6, 2), np.inf)), "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(("n", "factor"), [(10, 1.0), (11, np.sqrt(5 / 6))])
@pytest.mark.parametrize("paired", [False, True])
def test_an_interval_is_between_quantiles_of_the_halves(n, factor, paired):
    calls = []

    def between(rows, others) -> float:
        calls.append((rows, others))
        return float(len(calls) - 1)  # 0 for the whole, then 1 to 201

    found = mmd.from_halves(n, between, paired=paired, resamples=201, seed=0)
    low, high = 6 - 101, 196 - 101  # 2.5 and 97.5 percent of 1 to 201, less their mean
    assert found.value == 0 and found.n == n
    assert found.interval == pytest.approx((low * factor, high * factor))
    whole, *halves = calls
    assert [list(x) for x in whole] == [list(range(n))] * 2
    assert all(len(set(rows)) == len(set(others)) == len(rows) == 5 for rows, others in halves)
    assert all(np.array_equal(rows, others) for rows, others in halves) == paired
    assert len({tuple(rows) for rows, _ in halves}) > 100


def test_quantiles_of_the_mean_of_pairs():
    """The mean of n - 1 values, each 0 or 1, has a binomial distribution, whose quantiles are known."""
    n, values = 41, np.array([0.0, 1.0] * 20 + [0.5])
    found = mmd.measure_pairs(values, resamples=20000)
    scatter = np.std(values) / np.sqrt(n - 1)
    assert found.interval == pytest.approx((0.5 - 1.96 * scatter, 0.5 + 1.96 * scatter), abs=0.02)

"""The Frechet distance against scipy and against Gaussians of known distance."""

import numpy as np
import pytest

from sfv_jax.evaluation.frechet import Moments, extrapolate, frechet_distance, measure


def gaussians(n: int, d: int, seed: int = 0):
    """Returns samples of two Gaussians (means 0.5 apart, standard deviations 1 and 1.5) and their true distance."""
    rng = np.random.default_rng(seed)
    real, fake = rng.standard_normal((n, d)), 0.5 + 1.5 * rng.standard_normal((n, d))
    return real, fake, d * (0.5**2 + 0.5**2)


@pytest.mark.parametrize("ddof", [0, 1])
def test_scipy_agrees(ddof):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24)), rng.standard_normal((200, 24))
    first, second = (np.cov(x, rowvar=False, ddof=ddof) for x in (real, fake))
    root = linalg.sqrtm(first @ second)
    expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + np.trace(first + second - 2 * root.real)
    assert frechet_distance(Moments.of(real), Moments.of(fake), ddof) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features():
    """Rank-deficient covariances, where Newton's iteration fails; the centered data's nuclear norm is exact."""
    real, fake, _ = gaussians(50, 120)
    a, b = real - real.mean(0), fake - fake.mean(0)
    expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + ((a**2).sum() + (b**2).sum()) / 50
    expected -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum() / 50
    assert frechet_distance(Moments.of(real), Moments.of(fake)) == pytest.approx(expected, rel=1e-6)


def merged_moments(a: Moments, b: Moments) -> Moments:
    """Returns the moments of both sets together by the update of Chan, Golub and LeVeque."""
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n)
    return Moments(n, a.mean + shift * (b.n / n), scatter)


def test_parts_merge_to_the_whole():
    """Moments are sufficient statistics: those of the parts, in any order, determine those of the whole."""
    features = 5 + np.random.default_rng(1).standard_normal((101, 9))
    parts = [Moments.of(x) for x in np.split(features, [1, 40, 77])]
    merged = merged_moments(merged_moments(parts[2], parts[0]), merged_moments(parts[3], parts[1]))
    whole = Moments.of(features)
    assert merged.n == 101
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.scatter, whole.scatter, atol=1e-10)


def test_bias_falls_with_n_and_extrapolation_removes_most_of_it():
    truth = gaussians(20, 40)[2]
    few, many = (measure(*gaussians(n, 40)[:2], resamples=20) for n in (160, 640))
    assert few.value > many.value > truth
    assert abs(few.extrapolated - truth) < 0.5 * (few.value - truth)
    assert many.interval[0] < many.value < many.interval[1] and few.n == 160
    assert few.interval[1] - few.interval[0] > many.interval[1] - many.interval[0]


def test_bias_of_400_features_is_inverse_to_n():
    """The table of docs/evaluation.md: scores of one distribution against itself, and against another."""
    rng, deviation = np.random.default_rng(0), np.arange(1, 401) ** -0.25
    draw = lambda n, scale=1.0: scale * deviation * rng.standard_normal((n, 400))  # noqa: E731
    found = {n: frechet_distance(Moments.of(draw(n)), Moments.of(draw(n))) for n in (256, 512, 2048)}
    assert 512 * found[512] == pytest.approx(2048 * found[2048], rel=0.05)
    assert 256 * found[256] == pytest.approx(512 * found[512], rel=0.1)
    truth = 0.25 * np.sum(deviation**2)  # of deviations 1 and 1.5
    real, fake = draw(2048), draw(2048, 1.5)
    between = lambda a, b: frechet_distance(Moments.of(real[a]), Moments.of(fake[b]))  # noqa: E731
    assert 0.3 < (between(slice(None), slice(None)) - truth) / truth < 0.6
    assert extrapolate(2048, between, rng, points=3) == pytest.approx(truth, rel=0.05)


def test_same_set_is_at_distance_zero():
    real = gaussians(100, 8)[0]
    assert abs(frechet_distance(Moments.of(real), Moments.of(real))) < 1e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(np.zeros((30, 2)), np.zeros((31, 2))), "same number of samples, at least 20; got 30 and 31"),
        (lambda: Moments.of(np.array([[1.0, np.nan]])), "not finite"),
        (lambda: Moments.of(np.zeros(3)), r"got \(3,\)"),
        (lambda: Moments.of(np.zeros((1, 3))).covariance(1), "more than 1 samples, got 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def by_nuclear_norm(real: np.ndarray, fake: np.ndarray) -> float:
    """Returns the Frechet distance by singular values of the centered data, without covariances or their roots."""
    a, b = (x - x.mean(0) for x in (real, fake))
    spread = (a**2).sum() / len(a) + (b**2).sum() / len(b)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt(len(a) * len(b))
    return float(np.sum((real.mean(0) - fake.mean(0)) ** 2) + spread - 2 * cross)


def test_the_interval_is_a_bootstrap_around_the_distance():
    """Both sets are drawn with replacement; a 95 % interval leaves out 2.5 of 100 sorted draws on each side."""
    real, fake, _ = gaussians(30, 4)
    found = measure(real, fake, resamples=100, seed=5)
    rng, draws = np.random.default_rng(5), []
    for _ in range(100):
        rows = rng.integers(30, size=(2, 30))
        draws.append(by_nuclear_norm(real[rows[0]], fake[rows[1]]))
    value, ordered, mean = by_nuclear_norm(real, fake), sorted(draws), sum(draws) / 100
    low = ordered[2] + 0.475 * (ordered[3] - ordered[2])  # place 0.025 * 99 of the sorted draws
    high = ordered[96] + 0.525 * (ordered[97] - ordered[96])
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.interval == pytest.approx((low - mean + value, high - mean + value), rel=1e-9)


def test_intervals_have_the_width_of_the_scatter():
    values = [frechet_distance(*(Moments.of(x) for x in gaussians(80, 4, seed)[:2])) for seed in range(300)]
    found = [measure(*gaussians(80, 4, seed)[:2], seed=seed).interval for seed in range(300, 330)]
    low, high = np.percentile(values, [2.5, 97.5])
    assert 0.85 < np.mean([b - a for a, b in found]) / (high - low) < 1.2


def test_a_line_in_1_over_n_is_extrapolated_exactly():
    sizes = []

    def between(rows_real, rows_fake) -> float:
        assert len(set(rows_real)) == len(set(rows_fake)) == len(rows_real) and not np.array_equal(rows_real, rows_fake)
        sizes.append(len(rows_real))
        return 3 + 50 / len(rows_real)

    assert extrapolate(200, between, np.random.default_rng(0)) == pytest.approx(3, rel=1e-9)
    assert (min(sizes), max(sizes), len(sizes)) == (50, 200, 8)

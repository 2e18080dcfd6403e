"""Distances of feature vectors for small sets: the maximum mean discrepancy (MMD), and the mean distance of pairs.

The kernel is that of JEDi (Luo et al., arXiv 2410.05203), (x . y / d)^2, and so is the factor of 100. JEDi's estimate
counts each vector against itself, which adds a bias of order 1/n; here such terms are left out (Gretton et al., JMLR
13, 2012, Lemma 6). So the expectation does not depend on n, and two samples of one distribution score 0 on average,
below 0 in half of the cases. All arithmetic is float64 on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfv_jax.errors import UserError

MIN_PAIRS = 5  # below this an interval is meaningless
MEANING = (
    "MMD: 100 times the unbiased squared maximum mean discrepancy, kernel (x . y / d)^2; its interval is from random "
    "halves. Distance of pairs: Euclidean distance of the features of two clips of one condition, on average; its "
    "interval is a bootstrap over conditions."
)


@dataclass(frozen=True)
class Estimate:
    """An estimate and its uncertainty.

    Attributes:
      value: the estimate.
      interval: its 95 % interval.
      n: number of samples of each set, or of pairs.
    """

    value: float
    interval: tuple[float, float]
    n: int


def squared_mmd(x: np.ndarray, y: np.ndarray, paired: bool = False) -> float:
    """Computes 100 times the unbiased estimate of the squared MMD for the kernel (x . y / d)^2.

    Args:
      x, y: feature vectors `[n, d]` and `[m, d]`; n, m >= 2.
      paired: row k of `x` and row k of `y` depend on each other, so terms of both are left out too; n = m.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    own = _mean_kernel(x, x, distinct=True) + _mean_kernel(y, y, distinct=True)
    return 100 * (own - 2 * _mean_kernel(x, y, distinct=paired))


def _mean_kernel(a: np.ndarray, b: np.ndarray, distinct: bool) -> float:
    """Returns the mean of (a_i . b_j / d)^2 over all i, j, or over i != j if `distinct`.

    The sum of the squared products is the product of the second moments, which is cheaper for more rows than columns.
    """
    (n, d), m = a.shape, len(b)
    total = np.sum((a @ b.T) ** 2) if max(n, m) < d else np.sum((a.T @ a) * (b.T @ b))
    if distinct:
        return float(total - np.sum(np.sum(a * b, axis=1) ** 2)) / (d**2 * n * (n - 1))
    return float(total) / (d**2 * n * m)


def measure_mmd(
    real: np.ndarray, fake: np.ndarray, *, paired: bool = False, resamples: int = 200, seed: int = 0
) -> Estimate:
    """Measures 100 times the squared MMD of two sets of one size, with an interval from random halves of both.

    Half of the samples, drawn without replacement, scatter about the whole as much as the whole about the truth.
    (Resampling with replacement would count vectors against themselves.)

    Args:
      real, fake: feature vectors `[n, d]`.
      paired: as for `squared_mmd`; the halves then consist of pairs.
      resamples: number of halves.
      seed: seed of the halves.
    Raises:
      UserError: if the sets differ in size, are fewer than 5, or not finite.
    """
    n = common_size(real, fake)
    between = lambda rows, others: squared_mmd(real[rows], fake[others], paired)  # noqa: E731
    return from_halves(n, between, paired=paired, resamples=resamples, seed=seed)


def from_halves(n: int, between: Callable, *, paired: bool, resamples: int, seed: int) -> Estimate:
    """Estimates an unbiased distance of two sets, with an interval from random halves; arguments as in `measure_mmd`.

    Args:
      n: number of samples of each set.
      between: function from the row indices of both sets to their distance.
    """
    rng, size, everything = np.random.default_rng(seed), n // 2, np.arange(n)
    value, draws = between(everything, everything), []
    for _ in range(resamples):
        rows = rng.permutation(n)[:size]
        draws.append(between(rows, rows if paired else rng.permutation(n)[:size]))
    spread = (np.array(draws) - np.mean(draws)) * np.sqrt(size / (n - size))  # n may be odd
    low, high = np.percentile(spread, [2.5, 97.5]) + value
    return Estimate(value, (float(low), float(high)), n)


def measure_pairs(distances: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Estimates the mean of independent `distances [n]`, with a bootstrap interval.

    A resample consists of n - 1 distances, whose mean has the variance of the mean without bias; with n it would be
    too small by 1/n.

    Raises:
      UserError: if there are fewer than 5 distances, or one is not finite.
    """
    distances = np.asarray(distances, np.float64)
    n = common_size(distances, distances)
    draws = distances[np.random.default_rng(seed).integers(n, size=(resamples, n - 1))].mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(distances.mean()), (float(low), float(high)), n)


def pair_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the Euclidean distances `[n]` of the rows of `x [n, d]` and `y [n, d]`, float64."""
    return np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64), axis=1)


def common_size(x: np.ndarray, y: np.ndarray) -> int:
    """Returns the common number of samples of both sets.

    Raises:
      UserError: if the sets differ in size, are fewer than 5, or not finite.
    """
    if len(x) != len(y) or len(x) < MIN_PAIRS:
        raise UserError(f"both sets need the same number of samples, at least {MIN_PAIRS}; got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("features are not finite")
    return len(x)

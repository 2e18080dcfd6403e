"""Frechet distance between two sets of feature vectors, with extrapolation and interval for publication.

FVD is this distance on I3D features (Unterthiner et al., arXiv 1812.01717). All arithmetic is float64 on the host: in
float32, or by Newton's iteration for the root, 400 features of a few hundred clips give wrong or infinite results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfv_jax.errors import UserError

MIN_SAMPLES = 20  # of each set; below this the distance is meaningless


@dataclass(frozen=True)
class Moments:
    """Count, mean `[d]` and scatter `[d, d]` (sum of outer products about the mean) of feature vectors, float64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Computes the moments of `features [n, d]`.

        Raises:
          ValueError: if `features` is not a matrix of at least one row.
          UserError: if a feature is NaN or infinite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be [n, d] with n > 0, got {features.shape}")
        if not np.isfinite(features).all():
            raise UserError("features are not finite")
        mean = features.mean(axis=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def covariance(self, ddof: int = 0) -> np.ndarray:
        """Returns the covariance `[d, d]`, the scatter over n - `ddof`.

        Published FVD code divides by n (`ddof=0`, StyleGAN-V) or by n - 1 (the original).

        Raises:
          UserError: if there are at most `ddof` samples.
        """
        if self.n <= ddof:
            raise UserError(f"a covariance with ddof={ddof} needs more than {ddof} samples, got {self.n}")
        return self.scatter / (self.n - ddof)


def frechet_distance(a: Moments, b: Moments, ddof: int = 0) -> float:
    """Computes |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) by two eigendecompositions.

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric: no root of a
    non-symmetric product is needed. Eigenvalues that rounding makes negative count as 0.
    """
    first, second = a.covariance(ddof), b.covariance(ddof)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


@dataclass(frozen=True)
class Distance:
    """A Frechet distance and its uncertainty.

    Attributes:
      value: the distance at `n` samples of each set, which is biased upwards.
      extrapolated: limit for infinitely many samples (Chong and Forsyth, arXiv 1911.07023).
      interval: 2.5 and 97.5 percentiles of the distance over bootstrap resamples, shifted to have mean `value`.
      n: number of samples of each set.
    """

    value: float
    extrapolated: float
    interval: tuple[float, float]
    n: int


def measure(real: np.ndarray, fake: np.ndarray, *, ddof: int = 0, resamples: int = 100, seed: int = 0) -> Distance:
    """Measures the distance between `real [n, d]` and `fake [n, d]`, with its limit and a bootstrap interval.

    Args:
      real, fake: feature vectors of the two sets.
      ddof: as for `Moments.covariance`.
      resamples: number of bootstrap resamples; 0 gives NaN for the interval.
      seed: seed of the resamples.
    Raises:
      UserError: if the sets differ in size or have fewer than 20 samples: only distances at equal n are comparable.
    """
    if len(real) != len(fake) or len(real) < MIN_SAMPLES:
        least = f"both sets need the same number of samples, at least {MIN_SAMPLES}"
        raise UserError(f"{least}; got {len(real)} and {len(fake)}")
    rng = np.random.default_rng(seed)

    def between(rows_real, rows_fake) -> float:
        return frechet_distance(Moments.of(real[rows_real]), Moments.of(fake[rows_fake]), ddof)

    n, everything = len(real), slice(None)
    value = between(everything, everything)
    draws = np.array([between(*rng.integers(n, size=(2, n))) for _ in range(resamples)])
    # Drawing with replacement adds the same bias to all resamples: subtract their mean.
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5]) + value if resamples else (np.nan, np.nan)
    return Distance(value, extrapolate(n, between, rng), (float(low), float(high)), n)


def extrapolate(n: int, between: Callable, rng: np.random.Generator, points: int = 8) -> float:
    """Extrapolates a distance to infinitely many samples.

    Args:
      n: number of samples of each set.
      between: function from the row indices of both sets to their distance.
      rng: draws the subsets.
      points: number of subset sizes from n / 4 to n.
    Returns:
      The intercept at 1 / N = 0 of a line through the distances at these sizes.
    """
    sizes = np.unique(np.linspace(n // 4, n, points).astype(int))
    values = [between(rng.permutation(n)[:size], rng.permutation(n)[:size]) for size in sizes]
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    return float(intercept)

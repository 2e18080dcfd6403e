"""Frechet distance between two sets of feature vectors, with what a published number needs beside it.

FVD is this distance on I3D features (Unterthiner et al., arXiv 1812.01717). All arithmetic is float64 on the host: in
float32, or by Newton's iteration for the root, 400 features of a few hundred clips give wrong or infinite results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfv_jax.errors import UserError

MIN_SAMPLES = 20  # of each set: fewer say nothing


@dataclass(frozen=True)
class Moments:
    """Count, mean `[d]` and scatter `[d, d]` (sum of outer products about the mean) of feature vectors, float64.

    Moments of parts of a set, from shards, devices or hosts, merge to those of the whole.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of `features [n, d]`.

        Raises:
          ValueError: if they are not a finite matrix.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be [n, d] with n > 0, got {features.shape}")
        if not np.isfinite(features).all():
            raise UserError("features are not finite")
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub and LeVeque's update)."""
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), scatter)

    def covariance(self, ddof: int = 0) -> np.ndarray:
        """`[d, d]`. Published FVD code divides by n (`ddof=0`, StyleGAN-V) or by n - 1 (the original).

        Raises:
          UserError: if there are no more than `ddof` samples.
        """
        if self.n <= ddof:
            raise UserError(f"a covariance with ddof={ddof} needs more than {ddof} samples, got {self.n}")
        return self.scatter / (self.n - ddof)


def frechet_distance(a: Moments, b: Moments, ddof: int = 0) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by two eigen-decompositions.

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric: no root of a
    non-symmetric product is needed. Eigenvalues below 0 by rounding count as 0.
    """
    first, second = a.covariance(ddof), b.covariance(ddof)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


@dataclass(frozen=True)
class Distance:
    """A Frechet distance and what it is worth.

    Attributes:
      value: at `n` samples of each set.
      extrapolated: limit for infinitely many (Chong and Forsyth, arXiv 1911.07023); the value at n is biased upwards.
      interval: 2.5 and 97.5 percentiles of `value` over bootstrap resamples, moved so that its centre is `value`.
    """

    value: float
    extrapolated: float
    interval: tuple[float, float]
    n: int


def measure(real: np.ndarray, fake: np.ndarray, *, ddof: int = 0, resamples: int = 100, seed: int = 0) -> Distance:
    """The distance between `real [n, d]` and `fake [n, d]`, extrapolated and with a bootstrap interval.

    Raises:
      UserError: unless both sets have the same number of samples, at least 20: distances compare at equal n only.
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
    # Drawing with replacement adds bias of its own, in all resamples alike.
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5]) + value if resamples else (np.nan, np.nan)
    return Distance(value, extrapolate(n, between, rng), (float(low), float(high)), n)


def extrapolate(n: int, between: Callable, rng: np.random.Generator, points: int = 8) -> float:
    """The intercept at 1/N = 0 of a line through distances at `points` sample sizes from n / 4 to n."""
    sizes = np.unique(np.linspace(n // 4, n, points).astype(int))
    values = [between(rng.permutation(n)[:size], rng.permutation(n)[:size]) for size in sizes]
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    return float(intercept)

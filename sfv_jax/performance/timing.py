"""Timing of warm calls, with compilation reported separately, and the matrix-product speed of the device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls.

    Attributes:
      seconds: of each warm call.
      first: seconds of the first call, which may compile; None if it was not timed.
    """

    seconds: tuple[float, ...]
    first: float | None = None

    @property
    def median(self) -> float:
        """Median of the warm calls in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Fastest warm call in seconds."""
        return min(self.seconds)

    @property
    def compilation(self) -> float | None:
        """Extra seconds of the first call compared with the median; None if it was not timed."""
        return None if self.first is None else max(self.first - self.median, 0.0)

    def __str__(self) -> str:
        low, middle, high = (1000 * f(self.seconds) for f in (min, statistics.median, max))
        return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


def warm(call: Callable[[], object], repeats: int) -> Timing:
    """Times a first call of `call` and `repeats` warm ones, waiting for the device each time."""
    first, *rest = (_seconds(call) for _ in range(1 + repeats))
    return Timing(tuple(rest), first)


def alternate(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Times several calls in turns, so that slow moments of the machine affect all of them alike.

    In a turn each call runs twice and the second run is timed: before the first, another program used the caches.

    Args:
      calls: the calls by name.
      repeats: turns.
    """
    first = {name: _seconds(call) for name, call in calls.items()}
    turns = [{name: (_seconds(call), _seconds(call))[1] for name, call in calls.items()} for _ in range(repeats)]
    return {name: Timing(tuple(turn[name] for turn in turns), first[name]) for name in calls}


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def matmul_limit(dtype: str, size: int | None = None, repeats: int = 5) -> float:
    """Measures the FLOP/s of a chain of square matrix products on one device: its practical limit.

    Args:
      dtype: of the matrices.
      size: side of the matrices; None for 8192, or 1024 on CPU.
      repeats: timed calls, of which the fastest counts.
    """
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    chain = 8

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, chain, lambda _, y: (y @ x) * jnp.asarray(size**-0.5, x.dtype), x)

    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 * chain / min(warm(lambda: products(x), repeats).seconds)

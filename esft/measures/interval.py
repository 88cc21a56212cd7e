"""A figure with its confidence interval, by the percentile bootstrap over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 22  # counts held in memory at a time

Figure = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap confidence interval over the rows that it is made from."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of one value a row, with its interval."""
    return sums_interval([[value, 1.0] for value in values], _mean, seed=seed)


def sums_interval(rows: Any, figure: Figure, *, seed: int = 0) -> Interval:
    """Return a figure that is computed from sums over rows, with its interval.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13):
    as many rows are drawn with replacement, `RESAMPLES` times, and the interval lies between the
    2.5th and the 97.5th percentile of the figures of these draws.

    Args:
        rows: `[R, C]`: C numbers of each of R rows.
        figure: makes the figure of the C sums over rows.
        seed: of the draws.
    """
    counted_RC = np.asarray(rows, dtype=np.float64)
    many = len(counted_RC)
    random = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < RESAMPLES:
        draws = min(RESAMPLES - len(found), max(1, _AT_ONCE // many))
        times_DR = random.multinomial(many, np.full(many, 1 / many), size=draws)
        found += [figure(sums_C) for sums_C in times_DR @ counted_RC]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(found, [tail, 100 - tail])
    return Interval(float(figure(counted_RC.sum(axis=0))), float(low), float(high))


def _mean(sums: NDArray[np.float64]) -> float:
    return float(sums[0] / sums[1])

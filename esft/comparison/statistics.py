"""Means over seeds, their spread, and paired differences with what can be said of them.

The *spread* of some values is their standard deviation with n - 1 in the denominator. A paired
difference *exceeds the spread* if the mean of the pairs' differences is further from the
threshold (0 unless said otherwise) than the standard deviation of these differences. That is a mild
rule: were there no difference, three pairs would still exceed it about 23 times in 100 (the chance
that Student's |t| with two degrees of freedom is above the square root of 3). The 95 % confidence
interval beside it is the strict one, and with three pairs it is wide: 2.5 spreads to each side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from esft.errors import EsftError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Some values in short.

    Attributes:
        mean: of them.
        spread: their standard deviation (n - 1); None of a single value.
        count: how many they are.
    """

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up some values.

        Raises:
            EsftError: there are none.
        """
        if not values:
            raise EsftError("no value to take the mean of")
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1)), len(values))


@dataclass(frozen=True)
class Difference:
    """How far two methods are apart, from pairs of runs that differ in nothing else.

    Attributes:
        mean: of the pairs' differences.
        spread: the standard deviation of these differences (n - 1); None of a single pair.
        low, high: the 95 % confidence interval of the mean, by Student's t; None of a single pair.
        pairs: how many there are.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    pairs: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Self:
        """Sum up the differences of pairs.

        Raises:
            EsftError: there are none.
        """
        found = Summary.of(differences)
        if found.spread is None:
            return cls(found.mean, None, None, None, 1)
        half = t_quantile(found.count - 1) * found.spread / math.sqrt(found.count)
        return cls(found.mean, found.spread, found.mean - half, found.mean + half, found.count)

    @property
    def exceeds_spread(self) -> bool | None:
        """Whether the mean is further from 0 than the spread; None of a single pair."""
        return self.exceeds()

    def exceeds(self, threshold: float = 0.0) -> bool | None:
        """Say whether the mean is further from a threshold than the spread; None of one pair."""
        return None if self.spread is None else abs(self.mean - threshold) > self.spread


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Return by how much the values of one exceed those of the other with the same seed.

    Args:
        one: a method's values by seed.
        other: those of the method that it is compared with.

    Returns:
        None if the two have no seed in common.
    """
    differences = [value - other[seed] for seed, value in one.items() if seed in other]
    return Difference.of(differences) if differences else None


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the t that Student's |t| stays below with some probability.

    By bisection of the probability, a finite sum for whole degrees of freedom: Abramowitz and
    Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.

    Args:
        degrees: of freedom, at least 1.
        confidence: the probability, between 0 and 1.

    Raises:
        EsftError: an argument is out of its range.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise EsftError(f"no quantile of Student's t with {degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(64):
        middle = (low + high) / 2
        if _probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(degrees)


def _probability(angle: float, degrees: int) -> float:
    """Return the probability that |t| is below `tan(angle) * sqrt(degrees)`."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # Powers of the cosine, from 1 (odd) or 0 (even) up to degrees - 2, each with its factor.
    total, term = 0.0, cosine if odd else 1.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total

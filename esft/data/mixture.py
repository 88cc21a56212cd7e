"""Rows of several sources in one training set, in shares that follow from the sources' weights."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, TypeVar

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]
T = TypeVar("T")


def mix(sources: Sequence[Sequence[T]], counts: Sequence[int], *, seed: int) -> list[T]:
    """Draw `counts[i]` rows of each source and shuffle them all; the same seed gives the same rows.

    A source of which more rows are wanted than it has is taken whole as often as that fits, and
    the rest is drawn; otherwise no row is drawn twice.
    """
    rng = random.Random(seed)
    drawn: list[T] = []
    for rows, count in zip(sources, counts, strict=True):
        whole, rest = divmod(count, len(rows))
        drawn += list(rows) * whole + rng.sample(rows, rest)
    rng.shuffle(drawn)
    return drawn


def shares(
    sizes: Sequence[int], weights: Sequence[float], strategy: StoppingStrategy = "first_exhausted"
) -> list[int]:
    """Return how many rows of each source a mixture has.

    Source i has the share `w_i / sum(w)` of the mixture's M rows, exactly but for rounding to whole
    rows (largest remainders first, ties to the earlier source). With sizes `r_i`,

        first_exhausted:  M = floor(min_i r_i * sum(w) / w_i)   no row is repeated
        all_exhausted:    M = ceil(max_i r_i * sum(w) / w_i)    no row is left out

    which is where `datasets.interleave_datasets` stops by strategies of these names, if its random
    draws came out at the shares that they have on average.

    Args:
        sizes: rows of each source, at least 1.
        weights: above 0.
        strategy: see above.
    """
    # As written: 0.1 is a tenth here, which no float is.
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    limits = [size * total / weight for size, weight in zip(sizes, exact, strict=True)]
    rows = math.floor(min(limits)) if strategy == "first_exhausted" else math.ceil(max(limits))
    wanted = [rows * weight / total for weight in exact]
    counts = [math.floor(share) for share in wanted]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    return counts

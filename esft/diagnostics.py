"""What a layer's routing looks like as a whole: how even it is, what capacity it would need.

All figures come from how often each expert was chosen in the whole sample, so they do not depend
on how its rows were batched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# As files name them; exact, so that a capacity is rounded up where it should be.
CAPACITY_FACTORS = {name: Fraction(name) for name in ("1", "1.25", "1.5", "2")}


@dataclass(frozen=True)
class FixedByToken:
    """How far the id of a token alone fixes its experts, see `esft.token_routing`.

    Attributes:
        share: of the routed choices that fall on the id's majority experts, 0 to 1.
        without_id: the same share when all ids are taken together: what routing that ignores
            the id would reach.
        token_ids: how many ids were seen often enough.
        tokens: how many counted tokens these are.
    """

    share: float
    without_id: float
    token_ids: int
    tokens: int


@dataclass(frozen=True)
class Routing:
    """A layer's routing in a few figures.

    Attributes:
        entropy: see `entropy`; 1 is even.
        imbalance: see `imbalance`; 1 is even.
        dropped: by the capacity factor's name in `CAPACITY_FACTORS`, see `dropped`.
        fixed_by_token: None where no token id was seen often enough.
    """

    entropy: float
    imbalance: float
    dropped: dict[str, float]
    fixed_by_token: FixedByToken | None = None


def routing(counts: Sequence[int], fixed_by_token: FixedByToken | None = None) -> Routing:
    """Describe a layer's routing from how often each expert was chosen, `[E]`, not all 0."""
    return Routing(
        entropy=entropy(counts),
        imbalance=imbalance(counts),
        dropped={name: dropped(counts, factor) for name, factor in CAPACITY_FACTORS.items()},
        fixed_by_token=fixed_by_token,
    )


def entropy(counts: Sequence[int]) -> float:
    """Return the entropy of the choices over the experts, as a part of the highest possible one.

    `H = -sum_i s_i ln(s_i) / ln(E)` with `s_i` expert i's share of all choices, and 0 ln 0 = 0:
    1 where all experts are chosen equally often, 0 where one gets everything; 1 if E is 1.

    Args:
        counts: how often each expert was chosen, `[E]`, not all 0.
    """
    if len(counts) == 1:
        return 1.0
    total = sum(counts)
    shares = [count / total for count in counts if count]
    # `+ 0.0`: one expert with everything has an entropy of 0, not of -0.
    return -math.fsum(share * math.log(share) for share in shares) / math.log(len(counts)) + 0.0


def imbalance(counts: Sequence[int]) -> float:
    """Return how many times the mean load the busiest expert has: `E max_i s_i`, 1 to E.

    Args:
        counts: how often each expert was chosen, `[E]`, not all 0.
    """
    return len(counts) * max(counts) / sum(counts)


def dropped(counts: Sequence[int], factor: Fraction) -> float:
    """Return the share of choices beyond the experts' capacity.

    `sum_i max(0, n_i - C) / (K T)` with the capacity `C = ceil(c K T / E)` of the Switch
    Transformer (arXiv 2101.03961, equation 3, where K is 1) and `K T = sum_i n_i`. One capacity
    for the whole sample: what is dropped in smaller batches, whose experts have no time to even
    out, is more.

    Args:
        counts: how often each expert was chosen, `[E]`, not all 0.
        factor: the capacity factor c.
    """
    total = sum(counts)
    capacity = math.ceil(factor * total / len(counts))
    return sum(max(0, count - capacity) for count in counts) / total

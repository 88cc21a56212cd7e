"""Figures on a layer's routing, against plain arithmetic in exact fractions and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.diagnostics import CAPACITY_FACTORS, dropped, entropy, imbalance, routing

counts = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


def test_by_hand() -> None:
    # 8 choices over 4 experts: shares 1/2, 1/4, 1/4, 0; entropy 1.5 bits of 2.
    found = routing([4, 2, 2, 0])
    assert found.entropy == pytest.approx(0.75, abs=1e-15)
    assert found.imbalance == 2
    # Capacities 2, ceil(2.5) = 3, 3, 4.
    assert found.dropped == {"1": 0.25, "1.25": 0.125, "1.5": 0.125, "2": 0.0}
    assert found.fixed_by_token is None


@pytest.mark.parametrize("experts", [2, 3, 64])
def test_even_and_one_sided_routing(experts: int) -> None:
    even, one_sided = [7] * experts, [0] * (experts - 1) + [7]
    assert entropy(even) == pytest.approx(1, abs=1e-14)
    assert imbalance(even) == 1
    assert dropped(even, Fraction(1)) == 0
    assert entropy(one_sided) == 0
    assert math.copysign(1, entropy(one_sided)) == 1  # printed as 0, not as -0
    assert imbalance(one_sided) == experts
    assert dropped(one_sided, Fraction(1)) == (7 - math.ceil(7 / experts)) / 7


def test_a_layer_with_one_expert() -> None:
    assert routing([5]).entropy == 1
    assert routing([5]).imbalance == 1


@settings(derandomize=True, deadline=None, max_examples=200)
@given(row=counts, factor=st.sampled_from(sorted(CAPACITY_FACTORS)))
def test_the_plain_loop(row: list[int], factor: str) -> None:
    """Tokens are sent to their experts one by one; whoever finds the expert full is dropped."""
    numerator, denominator = {"1": (1, 1), "1.25": (5, 4), "1.5": (3, 2), "2": (2, 1)}[factor]
    room = 0
    while room * len(row) * denominator < numerator * sum(row):
        room += 1
    lost = 0
    for load in row:
        taken = 0
        for _ in range(load):
            if taken == room:
                lost += 1
            else:
                taken += 1
    assert dropped(row, CAPACITY_FACTORS[factor]) == lost / sum(row)
    bits = sum(n / sum(row) * math.log2(sum(row) / n) for n in row if n)
    highest = math.log2(len(row)) or 1.0
    if len(row) > 1:
        assert entropy(row) == pytest.approx(bits / highest, abs=1e-12)
    assert imbalance(row) == pytest.approx(float(max(row) / (Fraction(sum(row)) / len(row))))

"""Experts in groups of those that meet: against a plain loop, by hand, and through a profile."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.errors import SelectionError
from esft.grouping import group_experts, until_groups
from esft.layer_scores import HalfScores, LayerScores
from esft.profiling import profile_model
from esft.scores import Scores
from esft.selection import select
from tests.models import EXPERTS, tiny
from tests.test_token_routing import rows

# 0 and 3 meet most, then 1 and 3 (taken), then 1 and 2.
MEETINGS = [[9, 1, 0, 8], [1, 9, 5, 7], [0, 5, 9, 2], [8, 7, 2, 9]]


def symmetric(size: int, highest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    table = [[rng.randint(0, highest) for _ in range(size)] for _ in range(size)]
    return [[table[min(a, b)][max(a, b)] for b in range(size)] for a in range(size)]


def plain_groups(table: list[list[int]], size: int) -> list[list[int]]:
    """Look through all free pairs again for each one that is bound; the first of equals wins."""
    groups = [[expert] for expert in range(len(table))]
    while len(groups[0]) < size:
        free, bound = [list(group) for group in groups], []
        while free:
            best, best_meetings = (0, 0), -1
            for i in range(len(free)):
                for j in range(i + 1, len(free)):
                    meetings = 0
                    for a in free[i]:
                        for b in free[j]:
                            meetings += table[a][b]
                    if meetings > best_meetings:
                        best, best_meetings = (i, j), meetings
            i, j = best
            bound.append(sorted(free[i] + free[j]))
            del free[j], free[i]
        groups = sorted(bound)
    return groups


def test_by_hand() -> None:
    assert group_experts(MEETINGS, 2, layer=1) == [[0, 3], [1, 2]]
    assert group_experts(MEETINGS, 4, layer=1) == [[0, 1, 2, 3]]
    # Shares .4 and .6: group [1, 2] first, and in it expert 2 first.
    scores = [0.3, 0.2, 0.4, 0.1]
    groups = [[0, 3], [1, 2]]
    assert until_groups(scores, groups, 0.2) == [2, 1]
    assert until_groups(scores, groups, 0.61) == [2, 1, 0, 3]
    assert until_groups([0.25] * 4, groups, 0.2) == [0, 3]  # ties: the lower ids


def test_groups_of_four_are_pairs_of_pairs() -> None:
    # Pairs (0, 1), (2, 3), (4, 5), (6, 7) meet most; then (0, 1) with (6, 7): 4 meetings of 2.
    table = [[0] * 8 for _ in range(8)]
    for a, b, meetings in [(0, 1, 9), (2, 3, 9), (4, 5, 9), (6, 7, 9), (2, 4, 7)] + [
        (a, b, 2) for a in (0, 1) for b in (6, 7)
    ]:
        table[a][b] = table[b][a] = meetings
    assert group_experts(table, 4, layer=1) == [[0, 1, 6, 7], [2, 3, 4, 5]]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    quarter=st.integers(1, 4),
    highest=st.integers(0, 9),
    seed=st.integers(0, 999),
    size=st.sampled_from([2, 4]),
)
def test_the_plain_loop(quarter: int, highest: int, seed: int, size: int) -> None:
    table = symmetric(4 * quarter, highest, seed)
    groups = group_experts(table, size, layer=1)
    assert groups == plain_groups(table, size)
    assert sorted(expert for group in groups for expert in group) == list(range(4 * quarter))


def plain_selection(row: list[float], groups: list[list[int]], p: float) -> list[int]:
    left, chosen, running = [list(group) for group in groups], [], 0.0
    while left and running < p:
        best = max(left, key=lambda group: sum(row[expert] for expert in group))
        running += sum(row[expert] for expert in best)
        left.remove(best)
        while best:
            expert = max(best, key=lambda expert: row[expert])
            chosen.append(expert)
            best.remove(expert)
    return chosen


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("metric", ["token", "gate"])
def test_a_profile_s_groups_are_selected_whole(metric: str, size: int) -> None:
    found = profile_model(tiny("qwen3_moe"), rows(), cooccurrence=True)
    for p in (0.1, 0.4, 0.9):
        selection = select(found, p=p, metric=metric, group=size)
        assert selection.rule["group"] == size
        for index, layer in found.layers.items():
            assert layer.cooccurrence is not None
            total = sum(layer.metric(metric))
            share = [score / total for score in layer.metric(metric)]
            groups = plain_groups(layer.cooccurrence, size)
            assert selection.experts[index] == plain_selection(share, groups, p)
            assert len(selection.experts[index]) % size == 0
            assert len(selection.experts[index]) <= EXPERTS


def test_groups_and_an_automatic_p() -> None:
    half = HalfScores(10, [0.3, 0.2, 0.4, 0.1], [0.25] * 4)
    layer = LayerScores(4, 1, 20, half.token, half.gate, halves=(half, half), cooccurrence=MEETINGS)
    found = select(Scores({1: layer}), p="auto", cover=0.5, group=2)
    assert found.experts == {1: [2, 1]}
    assert (found.rule["p"], found.rule["auto"]["covered"]) == (0.01, pytest.approx(0.6))


def test_experts_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"--group 4: layer 7 has 6 experts"):
        group_experts(symmetric(6, 3, 0), 4, layer=7)

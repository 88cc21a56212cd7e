"""Scores of tasks compared: against plain arithmetic, by hand, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.errors import SelectionError
from esft.layer_scores import LayerScores
from esft.overlap import diff, jaccard, overlap, rank_correlation, task_names
from esft.scores import Scores


def made(rows: dict[int, list[float]], gate: dict[int, list[float]] | None = None) -> Scores:
    return Scores(
        {
            layer: LayerScores(len(row), 1, 100, row, (gate or rows)[layer])
            for layer, row in rows.items()
        }
    )


A = made({1: [0.5, 0.3, 0.1, 0.1], 3: [0.25, 0.25, 0.25, 0.25]})
B = made({1: [0.1, 0.1, 0.3, 0.5], 3: [0.25, 0.25, 0.25, 0.25]})
C = made({1: [2.0, 0.0, 1.0, 1.0], 3: [0.4, 0.3, 0.2, 0.1]})  # raw sums are not 1


def test_diff_by_hand() -> None:
    found = diff(A, B, p=0.6)
    first, third = found.layers[1], found.layers[3]
    assert first.distance == pytest.approx(0.6)
    # Ranks 3, 2, .5, .5 and .5, .5, 2, 3: deviations 1.5, .5, -1, -1 against -1, -1, .5, 1.5.
    assert first.rank_correlation == pytest.approx((-1.5 - 0.5 - 0.5 - 1.5) / 4.5)
    assert (first.entered, first.left, first.overlap) == ([3, 2], [0, 1], 0)
    assert (third.distance, third.rank_correlation, third.overlap) == (0, None, 1)
    assert found.distance == pytest.approx(0.3)
    assert found.rank_correlation == first.rank_correlation
    assert found.overlap == 3 / 7  # 3 experts of layer 3 in both, 4 of layer 1 in one


def test_diff_compares_the_metric_that_selects() -> None:
    a = made({1: [0.5, 0.5]}, gate={1: [0.9, 0.1]})
    b = made({1: [0.5, 0.5]}, gate={1: [0.1, 0.9]})
    assert diff(a, b).distance == 0
    assert diff(a, b, metric="gate").distance == pytest.approx(0.8)
    assert diff(a, b, preset="official-gate").distance == pytest.approx(0.8)


def test_diff_goes_both_ways() -> None:
    there, back = diff(A, C, p=0.6), diff(C, A, p=0.6)
    for layer in (1, 3):
        assert there.layers[layer].entered == back.layers[layer].left
        assert there.layers[layer].distance == pytest.approx(back.layers[layer].distance)
    # Shares of layer 1: .5 .3 .1 .1 against .5 0 .25 .25.
    assert there.layers[1].distance == pytest.approx(0.3)


def test_overlap_by_hand() -> None:
    found = overlap({"a": A, "b": B, "c": C}, p=0.6)
    assert found.names == ["a", "b", "c"]
    assert found.experts == [5, 5, 4]  # {0, 1}, {3, 2}, {0, 2}; {0, 1, 2} twice and {0, 1}
    assert found.layers[1] == [[1, 0, 1 / 3], [0, 1, 1 / 3], [1 / 3, 1 / 3, 1]]
    assert found.layers[3] == [[1, 1, 2 / 3], [1, 1, 2 / 3], [2 / 3, 2 / 3, 1]]
    assert found.total == [[1, 3 / 7, 3 / 6], [3 / 7, 1, 3 / 6], [3 / 6, 3 / 6, 1]]


def test_a_budget_may_leave_a_layer_to_one_task() -> None:
    a = Scores(made({1: [0.9, 0.1], 2: [0.5, 0.5]}).layers, model={"expert_parameters": 10})
    b = Scores(made({1: [0.5, 0.5], 2: [0.1, 0.9]}).layers, model={"expert_parameters": 10})
    found = diff(a, b, budget=10)
    assert (found.layers[1].left, found.layers[1].entered) == ([0], [])
    assert (found.layers[2].left, found.layers[2].entered) == ([], [1])
    assert overlap({"a": a, "b": b}, budget=10).total[0][1] == 0


def plain_ranks(values: list[int]) -> list[float]:
    """A value's rank is how many are below it, plus half of how many others equal it."""
    return [
        sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values
    ]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=10))
def test_rank_correlation_is_the_plain_formula(pairs: list[tuple[int, int]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    found = rank_correlation(x, y)
    p, q = plain_ranks(x), plain_ranks(y)
    middle = (len(pairs) - 1) / 2
    top = sum((a - middle) * (b - middle) for a, b in zip(p, q, strict=True))
    bottom = sum((a - middle) ** 2 for a in p) * sum((b - middle) ** 2 for b in q)
    if bottom == 0:
        assert found is None
    else:
        assert found == pytest.approx(top / bottom**0.5, abs=1e-12)


def test_jaccard() -> None:
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), {1}) == 0
    assert jaccard(set(), set()) == 1


def test_scores_of_other_models_are_refused() -> None:
    with pytest.raises(SelectionError, match="a has scores of layer 3 and b has none"):
        overlap({"a": A, "b": made({1: [0.25] * 4})})
    with pytest.raises(SelectionError, match="layer 3: a has 4 experts and b has 2"):
        overlap({"a": A, "b": made({1: [0.25] * 4, 3: [0.5] * 2})})
    with pytest.raises(SelectionError, match="the second has scores of layer 3"):
        diff(made({1: [0.25] * 4}), A)
    with pytest.raises(SelectionError, match="at least two"):
        overlap({"a": A})
    with pytest.raises(SelectionError, match="--p"):
        overlap({"a": A, "b": B}, p=2)


def test_names_of_tasks() -> None:
    assert task_names([Path("x/law.json"), Path("code.json")]) == ["law", "code"]
    assert task_names([Path("x/s.json"), Path("y/s.json"), Path("t.json")]) == [
        "x/s.json",
        "y/s.json",
        "t",
    ]
    with pytest.raises(SelectionError, match=r"x/s\.json: given twice"):
        task_names([Path("x/s.json"), Path("t.json"), Path("x/s.json")])

"""How sure a selection is, and the p that makes it sure: by hand, and against a plain search."""

from __future__ import annotations

import random

import pytest

from esft.errors import SelectionError
from esft.layer_scores import HalfScores, LayerScores
from esft.scores import Scores
from esft.selection import select
from esft.stability import stability


def test_stability_by_hand() -> None:
    def layers(*token: float) -> dict[int, LayerScores]:
        return {0: LayerScores(len(token), 1, 10, list(token), list(token))}

    whole = layers(0.4, 0.3, 0.2, 0.1)  # p = 0.6 selects 0 and 1
    parts = [layers(0.7, 0.0, 0.2, 0.1), layers(0.3, 0.4, 0.2, 0.1)]  # 0; and 1 and 0
    assert stability(whole, parts, p=0.6) == {"p": 0.6, "token": 0.75, "gate": 0.75}


def layer(first: list[float], second: list[float]) -> LayerScores:
    """A layer whose halves are as given, 10 tokens each; the gate scores are the reverse."""
    whole = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    halves = tuple(HalfScores(10, row, row[::-1]) for row in (first, second))
    return LayerScores(len(whole), 1, 20, whole, whole[::-1], halves=halves)


def test_auto_by_hand() -> None:
    # The two best experts change places between the halves: only both together are stable.
    scores = Scores({1: layer([0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1])})
    found = select(scores, p="auto")
    assert found.experts == {1: [0, 1]}
    # Up to 0.35 the whole sample selects expert 0 alone, which one half of two does.
    assert found.rule["p"] == 0.41  # up to 0.40 a half selects one expert
    assert found.rule["mass"] == "share"
    why = found.rule["auto"].pop("why")
    assert found.rule["auto"] == {
        "p": 0.41,
        "cover": 0.2,
        "covered": pytest.approx(0.7),
        "stable": 0.9,
        "stability": 1.0,
    }
    assert why.startswith("p 0.41 is the smallest at which 100 % of the selected experts stay")
    assert "get 70 % of the scores on the other (asked: 20 %)" in why
    assert "\n" not in why


def test_auto_covers_what_was_asked_for() -> None:
    scores = Scores({1: layer([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])})
    for cover, experts in ((0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (1, 4)):
        assert len(select(scores, p="auto", cover=cover).experts[1]) == experts
    gate = select(scores, p="auto", metric="gate", cover=0.41)
    assert (gate.experts, gate.rule["metric"]) == ({1: [3, 2]}, "gate")


def plain_search(
    scores: Scores, cover: float, metric: str, decimals: int | None
) -> tuple[float, float, float] | None:
    """Select by the tested p rule on each half as if it were a file of its own; try every p."""
    parts = [
        Scores(
            {
                index: LayerScores(
                    item.experts, 1, 10, item.halves[half].token, item.halves[half].gate
                )
                for index, item in scores.layers.items()
            }
        )
        for half in (0, 1)
    ]
    for p in (hundredths / 100 for hundredths in range(1, 101)):
        options = {"p": p, "metric": metric, "round": decimals}
        whole = select(scores, **options).experts  # type: ignore[arg-type]
        halves = [select(part, **options).experts for part in parts]  # type: ignore[arg-type]
        stay, got = [], []
        for half, other in ((0, 1), (1, 0)):
            chosen = {(i, e) for i, ids in whole.items() for e in ids}
            stay.append(sum(e in halves[half][i] for i, e in chosen) / len(chosen))
            for index, ids in halves[half].items():
                row = parts[other].layers[index].metric(metric)
                row = [x if decimals is None else round(x, decimals) for x in row]
                got.append(sum(row[expert] for expert in ids) / sum(row))
        if sum(stay) / 2 >= 0.9 and sum(got) / len(got) >= cover:
            return p, sum(got) / len(got), sum(stay) / 2
    return None


@pytest.mark.parametrize("decimals", [None, 2])
@pytest.mark.parametrize("metric", ["token", "gate"])
@pytest.mark.parametrize("cover", [0.2, 0.5, 0.8])
def test_auto_is_the_plain_search(cover: float, metric: str, decimals: int | None) -> None:
    rng = random.Random(f"{cover}{metric}")
    for noise in (0.0, 0.02, 0.1):
        rows = []
        for _ in range(3):
            base = [rng.random() ** 3 for _ in range(10)]
            pair = [[x + noise * rng.random() for x in base] for _ in range(2)]
            rows.append([[x / sum(half) for x in half] for half in pair])
        scores = Scores({index: layer(*pair) for index, pair in enumerate(rows, start=1)})
        expected = plain_search(scores, cover, metric, decimals)
        assert expected is not None
        found = select(scores, p="auto", cover=cover, metric=metric, round=decimals)
        auto = found.rule["auto"]
        assert found.rule["p"] == auto["p"] == expected[0]
        assert (auto["covered"], auto["stability"]) == pytest.approx(expected[1:])
        assert found.experts == select(scores, p=expected[0], metric=metric, round=decimals).experts


def test_halves_that_share_no_expert_have_no_p() -> None:
    scores = Scores({1: layer([1.0, 0.0], [0.0, 1.0])})
    with pytest.raises(SelectionError) as caught:
        select(scores, p="auto")
    for words in ("--p auto", "at p 1, 50 %", "get 0 % of the scores", "profile more tokens"):
        assert words in str(caught.value)


def test_auto_looks_at_the_chosen_layers_only() -> None:
    sure, unsure = layer([0.9, 0.1], [0.9, 0.1]), layer([1.0, 0.0], [0.0, 1.0])
    scores = Scores({1: sure, 2: unsure})
    assert select(scores, p="auto", layers="1").experts == {1: [0]}

"""How many experts a recipe trains, against real selections on extreme routings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esft.layer_scores import LayerScores
from esft.moe import anatomy
from esft.plans.counts import choose
from esft.recipe import make_recipe
from esft.scores import UNKNOWN_MODEL, Scores
from esft.selection import Selection, select
from tests.models import EXPERTS, TOP_K, tiny

FOUND = anatomy(tiny("qwen3_moe"))
LAYERS = len(FOUND.layers)


def recipe(**keys: Any) -> Any:
    return make_recipe({"model": "tiny-moe", "data": {"train": "rows.jsonl"}} | keys)


def scored(row: list[float]) -> Scores:
    layer = LayerScores(experts=EXPERTS, top_k=TOP_K, tokens=100, token=row, gate=row)
    sample = {"count": "all", "tokens": 100, "sequences": 1}
    layers = {found.index: layer for found in FOUND.layers}
    return Scores(layers=layers, model=dict(UNKNOWN_MODEL), sample=sample, stability={})


EVEN = [1 / EXPERTS] * EXPERTS
# Each token goes to the same K experts: no expert can have more.
CONCENTRATED = [1 / TOP_K] * TOP_K + [0.0] * (EXPERTS - TOP_K)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.25, 0.5, 0.75, 1.0])
def test_the_bounds_are_reached(p: float) -> None:
    choice = choose(recipe(selection={"p": p}), FOUND, None, 2)
    for scores, chosen in ((EVEN, choice.many), (CONCENTRATED, choice.few)):
        picked = select(scored(scores), p=p)
        assert chosen.per_layer() == [len(ids) for ids in picked.experts.values()]


def test_a_gate_score_can_be_all_of_a_layer() -> None:
    choice = choose(recipe(selection={"metric": "gate", "p": 0.9}), FOUND, None, 2)
    assert choice.few.per_layer() == [1] * LAYERS
    assert not choice.known


def test_raw_gate_mass_has_no_upper_bound_but_all() -> None:
    rule = {"metric": "gate", "p": 0.1, "mass": "raw"}
    choice = choose(recipe(selection=rule), FOUND, None, 2)
    assert choice.many.per_layer() == [EXPERTS] * LAYERS


def test_given_scores_the_number_is_known() -> None:
    row = [0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02]
    choice = choose(recipe(selection={"p": 0.6}), FOUND, scored(row), 2)
    assert choice.known
    assert choice.many.per_layer() == [2] * LAYERS
    assert choice.many.routed == pytest.approx(0.7)


def test_rules_that_say_the_number() -> None:
    choice = choose(recipe(selection={"top_n": 3, "layers": "1-2"}), FOUND, None, 2)
    assert choice.known
    assert choice.many.per_layer() == [3, 3]
    size = FOUND.per_expert
    choice = choose(recipe(selection={"budget": 7 * size}), FOUND, None, 2)
    assert sum(choice.many.per_layer()) == 7
    choice = choose(recipe(selection={"budget": f"{7 * 2 * size}B"}), FOUND, None, 2)
    assert sum(choice.many.per_layer()) == 7


def test_a_selection_file(tmp_path: Path) -> None:
    file = tmp_path / "selection.json"
    Selection({0: [1, 2], 2: [7]}).write(file)
    choice = choose(recipe(selection=str(file)), FOUND, None, 2)
    assert choice.known
    assert choice.many.selection == Selection.read(file)


def test_methods_without_a_selection() -> None:
    assert choose(recipe(method="full"), FOUND, None, 2).many.selection is None
    everything = choose(recipe(train={"experts": "all"}), FOUND, None, 2)
    assert everything.many.per_layer() == [EXPERTS] * LAYERS

"""Selection: official configurations, hand-made cases, a plain-loop oracle, files, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.errors import SelectionError
from esft.scores import UNKNOWN_MODEL, LayerScores, Scores
from esft.selection import Selection, select

OFFICIAL = Path(__file__).parents[2] / "shared" / "golden" / "official-esft"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "selection.json").read_text())
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"the official files are not in {OFFICIAL}"
)


def made(rows: dict[int, list[float]], **model: Any) -> Scores:
    """Return scores with the same rows for both metrics."""
    layers = {
        layer: LayerScores(len(row), 1, 100, list(row), list(row)) for layer, row in rows.items()
    }
    return Scores(layers, model=UNKNOWN_MODEL | model, sample={"count": "all"})


FOUR = made({1: [0.1, 0.2, 0.3, 0.4], 2: [0.25, 0.25, 0.25, 0.25]})


@needs_official
@pytest.mark.parametrize("name", ["intent", "translation"])
def test_official_configurations_come_out_exactly(name: str) -> None:
    expected = json.loads((OFFICIAL / f"{name}.config.json").read_text())
    found = select(Scores.read(OFFICIAL / f"{name}.scores.json"), preset="official-token")
    written = found.to_dict()
    assert written["experts"] == expected["experts"]
    assert {key: written[key] for key in expected} == expected


@needs_official
@pytest.mark.parametrize("name", ["intent", "translation"])
def test_official_configurations_are_read(name: str) -> None:
    found = Selection.read(OFFICIAL / f"{name}.config.json")
    found.check_against(dict.fromkeys(range(1, 27), 64))
    assert found.summary().layers == 26


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["why"])
def test_hand_made_cases(case: dict[str, Any]) -> None:
    rows = {int(layer): row for layer, row in GOLDEN["scores"].items()}
    found = select(made(rows, **GOLDEN["model"]), **case["options"])
    assert found.to_dict()["experts"] == case["experts"]


def plain_loop(scores: list[float], p: float, share: bool, decimals: int | None) -> list[int]:
    """The definition, written without sorting: pick the best one left until the sum reaches p."""
    left = {i: s if decimals is None else round(s, decimals) for i, s in enumerate(scores)}
    if share:
        whole = sum(left.values())
        left = {i: s / whole for i, s in left.items()}
    chosen: list[int] = []
    running = 0.0
    while left and running < p:
        best = -1
        for i in left:
            if best < 0 or left[i] > left[best]:
                best = i
        chosen.append(best)
        running += left.pop(best)
    return chosen


# Few distinct values, so that ties and sums of exactly p are common.
rows = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.10004, 0.2, 0.25, 0.3]), min_size=1, max_size=12)
row_of_any = st.lists(st.floats(0, 1), min_size=1, max_size=12)
cutoffs = st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5, 1.0]) | st.floats(1e-6, 1.0)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    row=(rows | row_of_any).filter(lambda row: sum(round(x, 2) for x in row) > 0),
    p=cutoffs,
    mass=st.sampled_from(["share", "raw"]),
    decimals=st.sampled_from([None, 2, 4]),
)
def test_p_rule_is_the_plain_loop(
    row: list[float], p: float, mass: str, decimals: int | None
) -> None:
    found = select(made({7: row}), p=p, mass=mass, round=decimals)
    assert found.experts == {7: plain_loop(row, p, mass == "share", decimals)}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(table=st.lists(rows.filter(any), min_size=1, max_size=4), data=st.data())
def test_budget_takes_the_best_shares_of_all_layers(table: list[list[float]], data: Any) -> None:
    layers = dict(enumerate(table, start=1))
    total = sum(map(len, table))
    count = data.draw(st.integers(1, total))
    left = {
        (layer, expert): score / sum(row)
        for layer, row in layers.items()
        for expert, score in enumerate(row)
    }
    expected: dict[int, list[int]] = {}
    for _ in range(count):
        best = max(left, key=lambda pair: left[pair])  # the first of equals: lower layer, lower id
        expected.setdefault(best[0], []).append(best[1])
        del left[best]
    found = select(made(layers, expert_parameters=70), budget=70 * count + 69)
    assert found.experts == dict(sorted(expected.items()))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**9), p=st.floats(0.01, 1))
def test_random_control_has_the_rule_s_size_in_each_layer(seed: int, p: float) -> None:
    rule, control = select(FOUR, p=p), select(FOUR, p=p, random=seed)
    assert {k: len(v) for k, v in control.experts.items()} == {
        k: len(v) for k, v in rule.experts.items()
    }
    assert control == select(FOUR, p=p, random=seed)
    control.check_against({1: 4, 2: 4})


def test_random_control_draws_every_expert_equally() -> None:
    layer = made({1: [1.0] + [0.0] * 7})
    drawn = [select(layer, top_n=1, random=seed).experts[1][0] for seed in range(4000)]
    # 500 each on average, with a standard deviation of 21.
    assert all(400 < drawn.count(expert) < 600 for expert in range(8))


def test_rule_and_model_are_in_the_file(tmp_path: Path) -> None:
    scores = made({1: [0.1, 0.9], 4: [0.5, 0.5]}, name="m", parameters=1000, expert_parameters=10)
    found = select(scores, metric="gate", p=0.3, layers="1-3", round=5)
    found.write(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "format": "esft-selection/1",
        "experts": {"1": [1]},
        "shared_experts": False,
        "non_expert_modules": False,
        "rule": {
            "metric": "gate",
            "pool": "all",
            "mass": "share",
            "p": 0.3,
            "round": 5,
            "layers": "1-3",
        },
        "model": UNKNOWN_MODEL | {"name": "m", "parameters": 1000, "expert_parameters": 10},
    }
    assert Selection.read(tmp_path / "s.json") == found


def test_metric_picks_its_row() -> None:
    scores = Scores({0: LayerScores(2, 1, 10, token=[0.9, 0.1], gate=[0.1, 0.9])})
    assert select(scores, p=0.5).experts == {0: [0]}
    assert select(scores, p=0.5, metric="gate").experts == {0: [1]}
    assert select(scores, preset="official-gate").rule["mass"] == "raw"


def test_summary() -> None:
    model = {
        "parameters": 4000,
        "routed_parameters": 1000,
        "expert_parameters": 10,
        "bytes_per_parameter": 2,
    }
    row = [0.1] * 10
    summary = select(made({1: row, 2: row, 3: [1.0, *row]}, **model), p=0.45).summary()
    assert (summary.layers, summary.experts) == (3, 11)
    assert (summary.fewest, summary.median, summary.most) == (1, 5, 5)
    assert (summary.parameters, summary.delta_bytes) == (110, 220)
    assert (summary.share_of_model, summary.share_of_experts) == (0.0275, 0.11)
    unknown = select(FOUR).summary()
    assert (unknown.parameters, unknown.share_of_model, unknown.delta_bytes) == (None, None, None)


@pytest.mark.parametrize(
    "value",
    [
        {"1": [2, 0], "3": [5]},
        {1: [2, 0], 3: [5]},
        {"experts": {"1": [2, 0], "3": [5], "4": []}},
        {"experts": {"1": [2, 0], "3": [5]}, "shared_experts": False, "non_expert_modules": False},
    ],
)
def test_explicit_lists_are_read(value: Any) -> None:
    assert Selection.from_dict(value).experts == {1: [2, 0], 3: [5]}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"p": 0}, ["--p must be above 0 and at most 1"]),
        ({"p": 1.5}, ["--p must be above 0 and at most 1"]),
        ({"p": float("nan")}, ["--p must be above 0 and at most 1"]),
        ({"p": "0.2"}, ["--p must be above 0 and at most 1"]),
        ({"p": 0.2, "top_n": 3}, ["--p", "--top-n"]),
        ({"p": 0.2, "budget": "5%"}, ["--p", "--budget"]),
        ({"top_n": 3, "budget": "5%"}, ["--top-n", "--budget"]),
        ({"top_n": 3, "mass": "raw"}, ["--top-n", "--mass"]),
        ({"budget": 10, "mass": "share"}, ["--budget", "--mass"]),
        ({"preset": "official-token", "metric": "gate"}, ["--metric", "--preset"]),
        ({"preset": "official-token", "p": 0.3}, ["--p 0.3", "--preset"]),
        ({"preset": "official-token", "round": 3}, ["--round", "--preset"]),
        ({"preset": "official-gate", "round": 4}, ["--round", "--preset"]),
        ({"preset": "official-gate", "mass": "share"}, ["--mass", "--preset"]),
        ({"preset": "official-gate", "top_n": 3}, ["--top-n", "--preset"]),
        ({"preset": "official-gate", "budget": 9}, ["--budget", "--preset"]),
        ({"preset": "oficial-token"}, ["--preset", 'did you mean "official-token"']),
        ({"metric": "tokens"}, ["--metric", "token or gate"]),
        ({"mass": "x"}, ["--mass", "share or raw"]),
        ({"round": -1}, ["--round"]),
        ({"top_n": 0}, ["--top-n"]),
        ({"top_n": 5}, ["--top-n 5", "layer 1 has 4"]),
        ({"budget": "0"}, ["--budget 0"]),
        ({"budget": "101%"}, ["--budget 101%"]),
        ({"budget": "lots"}, ["--budget lots", "500MB"]),
        ({"budget": "5%"}, ["--budget 5%", "parameters"]),
        ({"layers": "7-9"}, ["--layers 7-9", "layers 1 to 2"]),
        ({"layers": "x"}, ["--layers x"]),
        ({"layers": ""}, ["--layers"]),
        ({"p": "often"}, ["--p must be above 0 and at most 1 (it is often)"]),
        ({"cover": 0.5}, ["--cover", "--p auto"]),
        ({"p": 0.2, "cover": 0.5}, ["--cover", "--p auto"]),
        ({"p": "auto", "cover": 0}, ["--cover must be above 0 and at most 1"]),
        ({"p": "auto", "mass": "raw"}, ["--p auto", "--mass raw"]),
        ({"p": "auto", "top_n": 2}, ["--p and --top-n"]),
        ({"p": "auto", "preset": "official-token"}, ["--p auto", "--preset"]),
        ({"p": "auto"}, ["--p auto", "layer 1", "half", "profile again"]),
        ({"group": 3}, ["--group 3", "2 or 4"]),
        ({"group": 2}, ["--group 2", "layer 1", "--cooccurrence"]),
        ({"group": 2, "top_n": 2}, ["--group", "--top-n"]),
        ({"group": 2, "budget": "5%"}, ["--group", "--budget"]),
        ({"group": 2, "preset": "official-token"}, ["--group 2", "--preset"]),
        ({"random": -1}, ["--random"]),
        ({"random": True}, ["--random"]),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        select(FOUR, **options)
    for name in names:
        assert name in str(caught.value)


def test_a_preset_s_own_values_do_not_contradict_it() -> None:
    assert select(FOUR, preset="official-token", metric="token", p=0.2, round=4)


def test_a_budget_below_one_expert_is_an_empty_selection() -> None:
    scores = made({1: [0.5, 0.5]}, parameters=100, expert_parameters=20, bytes_per_parameter=2)
    with pytest.raises(SelectionError, match="selects nothing: one expert has 20 parameters"):
        select(scores, budget="19%")
    with pytest.raises(SelectionError, match="selects nothing: one expert has 40 bytes"):
        select(scores, budget="39B")
    assert select(scores, budget="20%").experts == {1: [0]}
    assert select(scores, budget="0.04kB").experts == {1: [0]}


def test_a_layer_of_zeros_has_no_shares() -> None:
    with pytest.raises(SelectionError, match="layer 2: all its scores are 0"):
        select(made({1: [0.5, 0.5], 2: [0.0, 0.0]}))


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([], "object"),
        ({}, "empty"),
        ({"experts": {}}, "empty"),
        ({"experts": {"1": []}}, "empty"),
        ({"experts": []}, "experts"),
        ({"experts": {"1": [1, 1]}}, "layer 1: expert 1 is in it twice"),
        ({"experts": {"1": [-1]}}, "layer 1: expert id -1"),
        ({"experts": {"1": [1.0]}}, "layer 1"),
        ({"experts": {"1": [True]}}, "layer 1"),
        ({"experts": {"one": [1]}}, '"one" is not a layer'),
        ({"experts": {"01": [1]}}, '"01" is not a layer'),
        ({"experts": {"1": [1], 1: [2]}}, "layer 1 is in it twice"),
        ({"experts": {"1": [1]}, "format": "esft-selection/9"}, "esft-selection/9"),
        ({"experts": {"1": [1]}, "shared_expert": True}, 'did you mean "shared_experts"'),
        ({"experts": {"1": [1]}, "shared_experts": 1}, "shared_experts"),
        ({"experts": {"1": [1]}, "rule": 1}, "rule"),
        ({"experts": {"1": [1]}, "model": {"parameters": "many"}}, "parameters"),
    ],
)
def test_bad_selection_files_are_named(tmp_path: Path, value: Any, names: str) -> None:
    with pytest.raises(SelectionError) as caught:
        Selection.from_dict(value, where="here.json")
    assert str(caught.value).startswith("here.json: ")
    assert names in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"none\.json: no such selection file"):
        Selection.read(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"experts":\n{"1": [1}}')
    with pytest.raises(SelectionError, match=r"broken\.json:2: not JSON"):
        Selection.read(tmp_path / "broken.json")


def test_a_selection_is_checked_against_a_model() -> None:
    found = Selection({1: [0, 7], 4: [3]})
    found.check_against({1: 8, 4: 8, 5: 8})
    with pytest.raises(SelectionError, match=r"layer 4.*are 1, 2"):
        found.check_against({1: 8, 2: 8})
    with pytest.raises(SelectionError, match=r"expert 7 in layer 1.*0 to 3"):
        found.check_against({1: 4, 4: 4})

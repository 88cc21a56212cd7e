"""What is missing or odd in a comparison does not keep pictures from being drawn."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from esft.comparison.records import Comparison
from esft.report.charts import ends, experts, progress, routing, sweeps, tradeoff
from esft.report.charts.style import line_styles
from tests.comparisons import comparison
from tests.report.charts.pictures import made_scores, numbers, of_comparison


def failed(made: Comparison) -> Comparison:
    """Return the comparison as if every run had failed."""
    records = [replace(run, outcome=None, points=[], error="no memory") for run in made.records]
    return replace(made, records=records)


ONE = comparison(["a"], ["full"], [0], evaluations=1, failures=False)
EDGES = {
    "one run": ONE,
    "nothing evaluated": comparison(["a"], ["full", "lora"], [0, 1], evaluations=0),
    "no general domains": comparison(["a"], domains=[], evaluations=2, sweeps={"p": [0.1, 0.2]}),
    "no base": replace(ONE, base={}),
    "nothing learnt": replace(
        ONE,
        records=[
            replace(run, points=[replace(run.points[0], step=at) for at in (0, 5)])
            for run in ONE.records
        ],
    ),
    "only failures": failed(comparison(["a"], evaluations=1, sweeps={"p": [0.1]})),
    "one swept value": comparison(["a"], ["esft"], [0], evaluations=1, sweeps={"p": [0.1]}),
    "no method": replace(ONE, methods=[], records=[]),
}
DRAWN = {
    "one run": 8,
    "nothing evaluated": 3,
    "no general domains": 8,
    "no base": 8,
    "nothing learnt": 8,
    "only failures": 0,
    "one swept value": 11,
    "no method": 0,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EDGES)
def test_what_there_is_is_drawn(name: str) -> None:
    drawn = [chart for chart in of_comparison(EDGES[name], "a") if chart is not None]
    assert len(drawn) == DRAWN[name], [chart.name for chart in drawn]
    for chart in drawn:
        ElementTree.fromstring(chart.svg)
        assert "nan" not in chart.svg.lower().replace("nanum", "")
        assert numbers(chart)


def test_captions_say_what_is_missing() -> None:
    made = comparison(["dates", "json", "sums"], evaluations=2)
    captions = {task: tradeoff.tradeoff(made, task).caption for task in made.tasks}  # type: ignore[union-attr]
    assert "full (of 6 runs 2 failed)" in captions["dates"]
    assert "esft-token (of 6 runs 2 not finished)" in captions["json"]
    assert "lora (no run to show: 6 failed)" in captions["sums"]
    rates = sweeps.learning_rates(made, "sums")
    assert rates is not None
    assert "lora (no run to show: 6 failed)" in rates.caption
    unchosen = replace(made, records=[replace(run, chosen=False) for run in made.records])
    rates = sweeps.learning_rates(unchosen, "dates")
    assert rates is not None
    assert rates.caption.endswith("Incomplete: full (of 6 runs 2 failed).")
    shown = {row["method"] for row in numbers(tradeoff.tradeoff(made, "sums"))}  # type: ignore[arg-type]
    assert "lora" not in shown
    assert "full" in shown


def test_the_tradeoff_tells_who_forgets_least() -> None:
    made = comparison(["a"], ["esft-token", "lora", "full"], [0, 1], failures=False)
    chart = tradeoff.tradeoff(made, "a")
    assert chart is not None
    told = chart.caption[chart.caption.index("least first") :]
    assert told.index("esft-token") < told.index("lora") < told.index("full")
    texts = [element.text for element in ElementTree.fromstring(chart.svg).iter()]
    assert texts.index("esft-token") < texts.index("lora") < texts.index("full")


def test_a_method_keeps_its_look_in_all_charts() -> None:
    """Also where another method before it has no run to show."""
    made = comparison(["dates", "json", "sums"], evaluations=2)
    colour = line_styles(made.methods)["full"].colour
    other = line_styles(made.methods)["lora"].colour
    for draw in (tradeoff.tradeoff, ends.score_against_bytes, progress.score_over_steps):
        with_lora, without = draw(made, "json"), draw(made, "sums")
        assert with_lora is not None
        assert without is not None
        assert colour in with_lora.svg
        assert other in with_lora.svg
        assert colour in without.svg
        assert other not in without.svg


def test_a_sweep_at_several_rates_shows_the_chosen_one() -> None:
    made = comparison(["a"], ["esft"], [0], evaluations=1, sweeps={"p": [0.1]}, failures=False)
    (swept,) = [run for run in made.records if run.sweep]
    assert swept.outcome is not None
    others = replace(swept, chosen=False, outcome=replace(swept.outcome, trained=1))
    found = sweeps.sweep(replace(made, records=[others, swept]), "a", "p")
    assert found is not None
    trained = {row["number"] for row in numbers(found) if row["figure"] == "trained"}
    assert trained == {swept.outcome.trained}


def test_scores_of_zero_and_layers_without_a_selection() -> None:
    scores = made_scores(0)
    layer = scores.layers[1]
    silent = replace(layer, token=[0.0] * layer.experts, gate=[0.0] * layer.experts)
    quiet = replace(scores, layers={1: silent})
    chart = experts.expert_map(quiet, name="quiet", title="Quiet")
    assert {row["percent_of_layer"] for row in numbers(chart)} == {0}
    same = routing.routing_change(scores, scores, name="same", title="Same")
    assert {row["change"] for row in numbers(same)} == {0}

"""Every picture's SVG: whole, scalable, the same each time, for light and dark, safe in a page."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from esft.report.chart import Chart
from esft.report.charts import experts, routing, tradeoff
from esft.report.charts.style import DARK
from tests.comparisons import comparison
from tests.report.charts.pictures import made_scores, of_comparison, of_scores

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
SWEPT = comparison(["dates", "sums"], sweeps={"p": [0.1, 0.2, 0.4]}, evaluations=4)


@pytest.fixture(scope="module")
def charts() -> list[Chart]:
    drawn = [chart for chart in of_comparison(SWEPT, "dates") if chart is not None]
    assert len(drawn) == 11  # nothing is missing of a full comparison
    return [*drawn, *of_scores()]


def test_one_scalable_element_with_a_name(charts: list[Chart]) -> None:
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        assert root.tag == f"{SVG}svg"
        assert chart.svg.startswith("<svg")  # no declaration, which a page could not hold
        left, top, width, height = map(float, root.attrib["viewBox"].split())
        assert (left, top) == (0, 0)
        assert 300 < width < 700
        assert 100 < height < 800
        assert root.attrib["width"] == "100%"
        assert "height" not in root.attrib
        assert root.attrib["role"] == "img"
        said = {element.get("id"): element.text for element in root.iter()}
        title, description = root.attrib["aria-labelledby"].split()
        assert said[title] == chart.title
        assert said[description] == chart.caption
        assert root.find(f"{SVG}metadata") is None
        assert not list(root.iter(f"{SVG}image"))


def test_identifiers_are_those_of_the_picture(charts: list[Chart]) -> None:
    seen: Counter[str] = Counter()
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        seen.update(own)
        referred = {element.attrib[HREF][1:] for element in root.iter() if HREF in element.attrib}
        referred |= set(re.findall(r"url\(#([^)]*)\)", chart.svg))
        assert referred
        assert referred <= set(own)
    assert seen.most_common(1)[0][1] == 1  # all pictures in one page


def test_styles_touch_nothing_but_pictures(charts: list[Chart]) -> None:
    for chart in charts:
        (sheet,) = ElementTree.fromstring(chart.svg).iter(f"{SVG}style")
        assert sheet.text is not None
        selectors = re.findall(r"(?:^|[{}])([^{}@]+)\{", sheet.text)
        assert len(selectors) > 5
        assert selectors[:2] == [".esft-chart *", ".esft-chart text"]
        # A marker is drawn by `<use>`, where an ancestor in the selector would not be found.
        colours = [re.fullmatch(r"\.esft-(fill|stroke)-\w{6}", one) for one in selectors[2:]]
        assert all(colours)


def test_every_colour_has_a_dark_one_that_applies(charts: list[Chart]) -> None:
    """On dark ground each fill and stroke is another, by a class that the style sheet knows."""
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        (sheet,) = root.iter(f"{SVG}style")
        assert sheet.text is not None
        dark = sheet.text[sheet.text.index("@media screen and (prefers-color-scheme:dark)") :]
        for element in root.iter():
            for kind, colour in re.findall(r"(fill|stroke): (#\w+)", element.get("style", "")):
                (name,) = [
                    name
                    for name in element.get("class", "").split()
                    if f".{name}{{{kind}:{DARK[colour]}!important}}" in dark
                ]
                assert colour[1:] in name
            if element.tag == f"{SVG}text":  # black if nothing is said
                assert "fill: #" in element.attrib["style"]


def test_text_stays_text_in_the_viewers_font(charts: list[Chart]) -> None:
    shown = " ".join(
        element.text or ""
        for chart in charts
        for element in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")
    )
    for word in ("esft-token", "base", "bytes saved", "learning rate", "expert", "layer by layer"):
        assert word in shown
    for chart in charts:
        assert not re.search(r'style="[^"]*font-family', chart.svg)
        assert "sans-serif}" in chart.svg


def test_letters_are_large_enough_on_a_phone(charts: list[Chart]) -> None:
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        width = float(root.attrib["viewBox"].split()[2])
        sizes = re.findall(r"font-size: ([\d.]+)px", chart.svg) or re.findall(
            r"font: (?:\S+ )*?([\d.]+)px", chart.svg
        )
        assert sizes
        assert min(map(float, sizes)) * 370 / width >= 8  # pixels at 400 px, with margins


def test_nothing_leaves_the_picture(charts: list[Chart]) -> None:
    many = comparison(["a"], [f"a-method-with-a-long-name-{at}" for at in range(12)], [0])
    wordy = comparison(["a"], ["one " * 40, "W" * 90, "任务" * 30], [0], failures=False)
    more = [
        tradeoff.tradeoff(many, "a"),
        tradeoff.tradeoff(wordy, "a"),
        routing.routing_of_methods(wordy, "a"),
    ]
    for chart in [*charts, *(chart for chart in more if chart is not None)]:
        root = ElementTree.fromstring(chart.svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter(f"{SVG}text"):
            style, turned = element.attrib["style"], element.get("transform", "")
            size = float(re.findall(r"([\d.]+)px", style)[0])
            place = re.search(r"translate\((\S+) (\S+)\)", turned)
            x, y = map(float, place.groups() if place else (element.get("x"), element.get("y")))
            assert -1 <= x <= width + 1, element.text
            assert 0 <= y <= height + 1, element.text
            if re.search(r"rotate\(-(90|45)", turned):
                continue
            # Letters are about half as wide as high on average; Chinese ones are square.
            reach = size * sum(0.5 if ord(letter) < 0x500 else 1 for letter in element.text or "")
            anchor = re.search(r"text-anchor: (\w+)", style)
            before = {"middle": 0.5, "end": 1.0}.get(anchor[1] if anchor else "", 0.0)
            assert x - before * reach >= -1, (chart.name, element.text)
            assert x + (1 - before) * reach <= width + 1, (chart.name, element.text)


def test_the_same_bytes_each_time_whatever_the_user_has_set(charts: list[Chart]) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        changed = dict(matplotlib.rcParams)
        again = [tradeoff.tradeoff(SWEPT, "dates"), next(of_scores())]
        assert dict(matplotlib.rcParams) == changed
    assert dict(matplotlib.rcParams) == before
    known = {chart.name: chart for chart in charts}
    assert all(chart == known[chart.name] for chart in again if chart is not None)


def test_names_of_any_kind(tmp_path: Path) -> None:
    task, other = "<&\"'>/../x\x00", "任务 $x$ {a}"
    methods = ["_under", "<b>&amp;", "$\\frac{1}{2}$", "naïve 🙂"]
    odd = comparison([task, other], methods, [0], failures=False)
    drawn = [
        chart
        for name in (task, other)
        for draw in (tradeoff.tradeoff, experts.experts_per_layer, routing.routing_of_methods)
        if (chart := draw(odd, name)) is not None
    ]
    assert len({chart.name for chart in drawn}) == len(drawn)
    for chart in drawn:
        assert re.fullmatch(r"[\w.-]+", chart.name, re.ASCII)
        chart.write(tmp_path)
        texts = {element.text for element in ElementTree.fromstring(chart.svg).iter()}
        if chart.name.startswith("tradeoff"):
            assert set(methods) <= texts
    assert len(drawn) == 6
    assert len(list(tmp_path.iterdir())) == 2 * len(drawn)


def test_names_of_tasks_are_not_taken_for_kinds_of_pictures() -> None:
    """Such as the score over steps of a task called `bytes` for the score against bytes."""
    kinds = [
        chart.name.removesuffix("-dates")
        for chart in of_comparison(comparison(["dates"], ["esft"], [0], evaluations=1), "dates")
        if chart is not None
    ]
    assert len(set(kinds)) == len(kinds) == 10
    for kind in kinds:
        assert not any(other.startswith(f"{kind}-") for other in kinds)


def test_more_experts_than_fit_make_a_wider_picture() -> None:
    chart = experts.expert_map(made_scores(0, 256, 3), name="wide", title="Wide")
    width = float(ElementTree.fromstring(chart.svg).attrib["viewBox"].split()[2])
    assert 500 < width < 700
    assert len(chart.svg) < 200_000

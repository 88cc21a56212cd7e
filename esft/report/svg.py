"""SVG pictures within a page: nothing in them acts or loads."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from esft.errors import EsftError
from esft.report.chart import Chart

_SVG = "http://www.w3.org/2000/svg"
_DRAWN = {
    *("svg", "g", "defs", "style", "title", "desc", "use", "symbol", "clipPath", "mask", "pattern"),
    *("path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan"),
    *("marker", "linearGradient", "radialGradient", "stop"),
}
_URL = re.compile(r"url\(\s*['\"]?([^)'\"\s]*)")
_WIDTH = re.compile(r"<svg\b[^>]*?\bviewBox=[\"']\s*\S+\s+\S+\s+([\d.]+)")


def inline(chart: Chart) -> str:
    """Return a chart's picture as markup to stand in a page: one `<svg>` element.

    Pictures hold names that users chose, and markup of a picture is markup of the page. So only
    elements that draw are let in, and no attribute that runs a script or loads a file.

    Raises:
        EsftError: the picture is not well-formed SVG, or has something else in it.
    """
    try:
        root = ElementTree.fromstring(chart.svg)
    except ElementTree.ParseError as error:
        raise EsftError(f"picture {chart.name}: not well-formed SVG: {error}") from None
    for element in root.iter():
        space, _, tag = str(element.tag).partition("}")
        if space != f"{{{_SVG}" or tag not in _DRAWN:
            raise EsftError(f"picture {chart.name}: <{tag or space}> cannot stand in a page")
        for name, value in element.attrib.items():
            _check_attribute(chart.name, name.rpartition("}")[2].lower(), value)
        if tag == "style":
            _check_style(chart.name, element.text or "")
    return chart.svg[chart.svg.index("<svg") :].strip()


def width(chart: Chart) -> float:
    """Return the width of a chart's picture in its own units, about pixels."""
    found = _WIDTH.search(chart.svg)
    if found is None:
        raise EsftError(f"picture {chart.name}: it has no viewBox")
    return float(found[1])


def _check_attribute(picture: str, name: str, value: str) -> None:
    if name.startswith("on") or (name in ("href", "src") and not value.startswith("#")):
        raise EsftError(f"picture {picture}: {name}={value!r} cannot stand in a page")
    _check_style(picture, value)


def _check_style(picture: str, text: str) -> None:
    outside = [target for target in _URL.findall(text) if not target.startswith("#")]
    if outside or "@import" in text:
        raise EsftError(f"picture {picture}: it loads {outside or 'a style sheet'}")

"""A matplotlib figure as an SVG that a page can hold: scalable, light and dark, with a name.

matplotlib's output is good, but made for a file of its own: it has an absolute size, one style for
every element of the page it is put into, and identifiers that two pictures share.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from esft.report.charts.style import DARK, RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

CLASS = "esft-chart"  # of the `<svg>` element
GROUND = "ground"  # class of the rectangle behind everything: a page may hide it
_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_FONTS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, "
    "'Noto Sans', 'DejaVu Sans', sans-serif"
)
_COLOUR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")
_FAMILY = re.compile(r";? ?font-family: [^;]*")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_NUMBERS = ("d", "x", "y", "transform", "width", "height")
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw inside: the same figure gives the same bytes, whatever the user's matplotlib says.

    Args:
        name: of the picture; what identifiers are made from.
    """
    from matplotlib import rc_context, rcParamsDefault

    given = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    with rc_context({**given, **RC, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters are left to the viewer's fonts, so it is no matter that ours lack a few.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Return the figure as one `<svg>` element.

    Args:
        figure: drawn inside `drawing(name)`, in colours of `esft.report.charts.style`.
        name: unique among the pictures of a page; starts every identifier in it.
        title: what screen readers call it.
        description: what they read out of it.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=_NO_METADATA)
    svg = ElementTree.fromstring(text.getvalue().encode())
    colours: set[str] = set()
    for element in svg.iter():
        for child in element.findall(f"{_SVG}style"):
            element.remove(child)
        _own_identifiers(element, name)
        colours |= _classes(element)
        _shorten(element)
    # The first rectangle of a figure is its ground.
    ground = next(svg.iter(f"{_SVG}path"))
    ground.set("class", f"{GROUND} {ground.get('class', '')}".strip())
    for attribute in ("width", "height", "version"):
        del svg.attrib[attribute]
    svg.attrib |= {
        "class": CLASS,
        "width": "100%",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for tag, content in (("style", _style_sheet(colours)), ("desc", description), ("title", title)):
        child = ElementTree.Element(f"{_SVG}{tag}")
        child.text = content
        if tag != "style":
            child.set("id", f"{name}-{tag}")
        svg.insert(0, child)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _own_identifiers(element: ElementTree.Element, name: str) -> None:
    if identifier := element.get("id"):
        element.set("id", f"{name}-{identifier}")
    if target := element.get(_HREF):
        element.set(_HREF, f"#{name}-{target.removeprefix('#')}")
    if path := element.get("clip-path"):
        element.set("clip-path", f"url(#{name}-{path.removeprefix('url(#')}")


def _classes(element: ElementTree.Element) -> set[str]:
    """Give the element a class for each colour that dark ground changes; return these colours."""
    style = element.get("style")
    if style is None:
        return set()
    element.set("style", _FAMILY.sub("", style).removeprefix("; "))
    found = [(kind, colour) for kind, colour in _COLOUR.findall(style) if colour in DARK]
    if found:
        element.set("class", " ".join(f"esft-{kind}-{colour[1:]}" for kind, colour in found))
    return {colour for _, colour in found}


def _shorten(element: ElementTree.Element) -> None:
    """Leave out what makes a file large: blanks, and digits below a hundredth of a point."""
    for attribute in _NUMBERS:
        if value := element.get(attribute):
            short = _NUMBER.sub(lambda number: _hundredths(number[0]), value)
            element.set(attribute, " ".join(short.split()))
    if element.tag != f"{_SVG}text":
        element.text = None
    element.tail = None


def _hundredths(number: str) -> str:
    short = f"{float(number):.2f}".rstrip("0").rstrip(".")
    return "0" if short == "-0" else short


def _style_sheet(colours: set[str]) -> str:
    # No ancestors in the selectors: what `<use>` shows is a tree of its own and has none.
    rules = "".join(
        f".esft-{kind}-{colour[1:]}{{{kind}:{DARK[colour]}!important}}"
        for colour in sorted(colours)
        for kind in ("fill", "stroke")
    )
    return (
        f".{CLASS} *{{stroke-linejoin:round;stroke-linecap:butt}}"
        f".{CLASS} text{{font-family:{_FONTS}}}"
        # Paper is light, whatever the screen is.
        f"@media screen and (prefers-color-scheme:dark){{{rules}}}"
    )

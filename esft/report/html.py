"""A report as one HTML file that needs nothing beside it: style and pictures are in it."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
from markupsafe import Markup

from esft.report import svg
from esft.report.chart import Chart
from esft.report.page import Page

_TEMPLATES = Path(__file__).parent / "templates"


def page_html(page: Page) -> str:
    """Return a report as HTML; every text in it is escaped.

    Raises:
        EsftError: a picture cannot stand in the page, see `esft.report.svg.inline`.
    """
    style = Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8"))
    template = _environment().get_template("page.html.jinja")
    return template.render(page=page, style=style, picture=_picture, width=svg.width)


def _picture(chart: Chart) -> Markup:
    return Markup(svg.inline(chart))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

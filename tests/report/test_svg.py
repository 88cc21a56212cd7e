"""Pictures within a page: what draws is let in, what acts or loads is not."""

from __future__ import annotations

import pytest

from esft.errors import EsftError
from esft.report.chart import Chart
from esft.report.svg import inline, width

_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '


def chart(content: str, attributes: str = 'viewBox="0 0 360.5 200"') -> Chart:
    return Chart("name", "a title", "a caption", f"{_HEAD}{attributes}>{content}</svg>\n", "")


def test_what_draws_is_let_in_as_it_is() -> None:
    content = (
        '<defs><clipPath id="a"><rect width="9" height="9"/></clipPath></defs>'
        '<g clip-path="url(#a)"><text>&lt;script&gt; 1 &lt; 2</text></g><use xlink:href="#a"/>'
    )
    given = chart(content)
    assert inline(given) == given.svg.strip()
    declared = Chart("n", "t", "c", f'<?xml version="1.0"?>\n{given.svg}', "")
    assert inline(declared) == given.svg.strip()
    assert width(given) == 360.5


@pytest.mark.parametrize(
    ("content", "attributes"),
    [
        ("<script>alert(1)</script>", ""),
        ("<g><SCRIPT/></g>", ""),
        ("<foreignObject><p xmlns='http://www.w3.org/1999/xhtml'/></foreignObject>", ""),
        ("<p xmlns='http://www.w3.org/1999/xhtml'/>", ""),
        ("<image href='#a'/>", ""),
        ("<a href='#a'><text>x</text></a>", ""),
        ("<animate attributeName='href' values='javascript:alert(1)'/>", ""),
        ("", "onload='alert(1)'"),
        ("<g OnClick='alert(1)'/>", ""),
        ("<use href='other.svg#a'/>", ""),
        ("<use xlink:href='https://example.org/#a'/>", ""),
        ("<rect fill='url(https://example.org/a)'/>", ""),
        ("<rect style='fill: url( \"//example.org/a\" )'/>", ""),
        ("<style>@import 'a.css';</style>", ""),
        ("<style>text { background: url(a.png) }</style>", ""),
        ("<g>", ""),
    ],
)
def test_what_acts_or_loads_is_not(content: str, attributes: str) -> None:
    with pytest.raises(EsftError, match="picture name: "):
        inline(chart(content, attributes))


def test_a_picture_says_how_wide_it_is() -> None:
    with pytest.raises(EsftError, match="viewBox"):
        width(chart("", ""))

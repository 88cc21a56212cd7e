"""Markdown of a report: any text comes out of a reader as it went in."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from esft.report.markdown import page_markdown
from esft.report.page import Cell, Listing, Page, Section, Table, Text


@pytest.mark.parametrize(
    "text",
    [
        "a_b_c *d* `e` [f](g) ![h](i) <j> &amp; ~~k~~ \\ | l",
        "# a",
        "- a",
        "---",
        "-4.0 to 1.5",
        "0.5",
        "+ a",
        "1. a",
        "2) a",
        "> a",
        "a | b",
        "<script>alert(1)</script>",
        "__init__",
        "a\nb\n\n# c",
        "$x$",
    ],
)
def test_text_is_what_it_was(text: str) -> None:
    table = Table(text, ["", text], [[Cell(text), Cell(text)]])
    page = Page("run", text, text, [Section("a", text, [Text(text), table])], text)
    tokens = MarkdownIt("commonmark").enable("table").parse(page_markdown(page))
    shown = [
        "".join(part.content for part in token.children or [] if part.type == "text")
        for token in tokens
        if token.type == "inline"
    ]
    kinds = {part.type for token in tokens for part in token.children or []}
    line = " ".join(text.split())
    # Title, lead, section, paragraph, caption, head, two cells, end.
    assert shown == [line, line, line, line, line, "", line, line, line, f"Written by {line}."]
    assert kinds <= {"text", "strong_open", "strong_close", "text_special"}


def test_a_listing_keeps_its_fences() -> None:
    text = "a\n```\nb\n````\n"
    page = Page("run", "t", "l", [Section("a", "s", [Listing("file", text)])], "me")
    tokens = MarkdownIt("commonmark").parse(page_markdown(page))
    assert [token.content for token in tokens if token.type == "fence"] == [text]

"""Names: broken into lines that fit, and made into names of files that differ."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from esft.report.charts.scales import short
from esft.report.charts.text import clean, file_name, text_width, wrap


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(max_size=80), st.floats(0.5, 3))
def test_no_letter_is_lost_and_no_line_is_too_long(text: str, inches: float) -> None:
    line = clean(text)
    lines = wrap(line, inches, 9)
    assert "".join("".join(lines).split()) == "".join(line.split())
    for part in lines:
        assert text_width(part, 9) <= inches + 1e-9


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.text("ab1-. _/任", max_size=8), unique=True, min_size=2))
def test_file_names_differ(tasks: list[str]) -> None:
    names = [file_name("score-bytes", task) for task in tasks]
    for name in names:
        assert len(name) <= 68
        assert name.isascii()
        assert not set(name) & set('/\\:*?"<>| \0')
        assert not name.startswith(".")
    assert len(set(names)) == len(names)


def test_plain_names_stay() -> None:
    assert file_name("tradeoff", "dates") == "tradeoff-dates"
    assert file_name("tradeoff", "a/b").startswith("tradeoff-a-b-")
    assert file_name("tradeoff", "a/b") != file_name("tradeoff", "a b")


def test_short_numbers() -> None:
    found = [short(value) for value in (0, 0.05, 8, 999, 999.6, 1500, 199_680, 5.1e6, 2e10)]
    assert found == ["0", "0.05", "8", "999", "1 k", "1.5 k", "200 k", "5.1 M", "20 G"]
    assert short(404_000, "B") == "404 kB"
    assert short(12, "B") == "12 B"

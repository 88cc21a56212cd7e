"""Skipping bad rows: how many, which errors, and what is written."""

import json
from pathlib import Path

import pytest

from esft.data.bad_rows import STRICT, BadRows
from esft.errors import DataError


def test_nothing_is_skipped_unless_asked_for() -> None:
    error = DataError("a.jsonl:3: not JSON")
    for bad_rows in (BadRows(), STRICT):
        with pytest.raises(DataError) as caught:
            bad_rows.skip(error)
        assert caught.value is error
        assert bad_rows.skipped == []


def test_rows_up_to_the_limit_are_recorded(tmp_path: Path) -> None:
    bad_rows = BadRows(2)
    bad_rows.skip(DataError("data/a.jsonl:3: not JSON: at column 4: here"))
    bad_rows.skip(DataError("b.parquet[17]: `prompt` is “null”"))
    bad_rows.skip(DataError("data/a.jsonl:3: again, a row counts once"))
    with pytest.raises(DataError) as caught:
        bad_rows.skip(DataError("a.jsonl:9: no `prompt`"))
    assert str(caught.value) == (
        "a.jsonl:9: no `prompt` (2 bad rows skipped before this one, as many as --skip-bad 2 "
        "allows)"
    )
    found = [
        {"where": "data/a.jsonl:3", "reason": "not JSON: at column 4: here"},
        {"where": "b.parquet[17]", "reason": "`prompt` is “null”"},
    ]
    assert bad_rows.skipped == found
    bad_rows.write(tmp_path / "bad_rows.jsonl")
    lines = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found


@pytest.mark.parametrize("message", ["a.jsonl: no such data file", "no rows to score"])
def test_an_error_of_no_single_row_is_never_skipped(message: str) -> None:
    bad_rows, error = BadRows(9), DataError(message)
    with pytest.raises(DataError) as caught:
        bad_rows.skip(error)
    assert caught.value is error
    assert bad_rows.skipped == []


def test_a_negative_limit() -> None:
    with pytest.raises(DataError, match=r"^--skip-bad -1: expected 0 or more"):
        BadRows(-1)

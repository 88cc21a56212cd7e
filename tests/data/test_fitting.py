"""Rows too long: left out, cut where it costs nothing, or as asked for; always counted and said."""

from __future__ import annotations

import pytest

from esft.data.example import Example
from esft.data.fitting import Truncation, fit
from esft.errors import DataError
from tests.notes import Notes


def example(prompt: int, answer: int, after: int = 0, where: str = "f:1") -> Example:
    """Tokens 0, 1, 2, ...; the middle part is the answer."""
    length = prompt + answer + after
    return Example(list(range(length)), [False] * prompt + [True] * answer + [False] * after, where)


def test_rows_that_do_not_fit_are_counted_and_reported() -> None:
    examples = [
        example(2, 3, where="f:1"),
        example(4, 2, where="f:2"),
        example(1, 3, 9, where="f:3"),
        example(9, 1, where="f:4"),
    ]
    notes = Notes()
    fitted = fit(examples, 5, reporter=notes)
    assert [(e.where, len(e.input_ids)) for e in fitted.examples] == [("f:1", 5), ("f:3", 5)]
    assert fitted.examples[1].completion == [False, True, True, True, False]
    assert notes.notes == [
        "2 of 4 rows left out: their answers end beyond max_length 5 "
        "(the first: f:2 with 6 tokens)",
        "1 of 4 rows cut to max_length 5, after the answer",
    ]
    assert fitted.dropped == [("f:2", 6), ("f:4", 10)]
    assert fitted.to_dict() == {
        "rows": 4,
        "dropped": 2,
        "cut_after_answer": 1,
        "cut_beginning": 0,
        "answer_tokens_lost": 0,
        "split": 0,
    }


@pytest.mark.parametrize("truncation", ["drop", "error", "keep_end", "split"])
def test_nothing_is_said_when_all_rows_fit(truncation: Truncation) -> None:
    notes = Notes()
    examples = [example(2, 3), example(1, 1), example(0, 5)]
    fitted = fit(examples, 5, truncation=truncation, first_id=0, reporter=notes)
    assert fitted.examples == examples
    assert notes.notes == []


@pytest.mark.parametrize("truncation", ["drop", "split"])
def test_no_row_fits(truncation: Truncation) -> None:
    with pytest.raises(DataError, match=r"^f:1 with 5 tokens: no row fits into max_length 4"):
        fit([example(2, 3)], 4, truncation=truncation)


def test_a_row_too_long_is_an_error_where_asked_for() -> None:
    examples = [example(1, 1), example(4, 2, where="f:2")]
    with pytest.raises(DataError, match=r"^f:2: 6 tokens do not fit into max_length 5"):
        fit(examples, 5, truncation="error")
    (_, cut) = fit([example(1, 1), example(2, 2, 9)], 5, truncation="error").examples
    assert cut.input_ids == [0, 1, 2, 3, 4]  # the answer is whole


@pytest.mark.parametrize(
    ("row", "first_id", "kept", "lost"),
    [
        pytest.param(example(6, 2), None, [3, 4, 5, 6, 7], 0, id="of the prompt"),
        pytest.param(example(6, 2), 0, [0, 4, 5, 6, 7], 0, id="BOS stays"),
        pytest.param(example(6, 2), 9, [3, 4, 5, 6, 7], 0, id="no BOS"),
        # Token 2 is answer and goes; token 3 is the first now, which nothing predicts.
        pytest.param(example(2, 6), None, [3, 4, 5, 6, 7], 2, id="of the answer"),
        pytest.param(example(6, 2, 7), None, [3, 4, 5, 6, 7], 0, id="what follows goes first"),
    ],
)
def test_keep_end(row: Example, first_id: int | None, kept: list[int], lost: int) -> None:
    notes = Notes()
    fitted = fit([row], 5, truncation="keep_end", first_id=first_id, reporter=notes)
    (example_kept,) = fitted.examples
    assert example_kept.input_ids == kept
    assert example_kept.completion == [row.completion[token] for token in kept]
    assert (fitted.cut_before, fitted.lost_answers) == (1, lost)
    also = f", {lost} answer tokens with it" if lost else ""
    assert notes.notes == [f"1 of 1 rows lost their beginning{also}: kept are the last 5 tokens"]


def test_text_is_split_and_what_has_a_prompt_is_not() -> None:
    weights = [float(token) for token in range(12)]
    text = Example(list(range(12)), [True] * 12, "f:1", weights)
    notes = Notes()
    fitted = fit([text, example(9, 2, where="f:2")], 5, truncation="split", reporter=notes)
    assert [e.input_ids for e in fitted.examples] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [e.weights for e in fitted.examples] == [weights[:5], weights[5:10], weights[10:]]
    assert fitted.dropped == [("f:2", 11)]
    assert notes.notes[1] == "1 of 2 rows of text split into pieces of 5 tokens"

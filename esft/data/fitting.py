"""What happens to rows that are longer than a model is trained on; nothing is lost silently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from esft.data.example import Example
from esft.errors import DataError
from esft.progress import SILENT, Reporter

Truncation = Literal["drop", "error", "keep_end", "split"]


@dataclass(slots=True)
class Fitted:
    """Examples that fit, and what was done to make them.

    Attributes:
        examples: each of at most `max_length` tokens, in the order of their rows.
        rows: how many there were.
        dropped: `file:line` and tokens of each row left out whole.
        cut_after: rows that lost only what followed their last answer.
        cut_before: rows that lost their beginning.
        lost_answers: answer tokens that were in a beginning.
        split: rows of text that became several examples.
    """

    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    dropped: list[tuple[str, int]] = field(default_factory=list)
    cut_after: int = 0
    cut_before: int = 0
    lost_answers: int = 0
    split: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, JSON-ready."""
        return {
            "rows": self.rows,
            "dropped": len(self.dropped),
            "cut_after_answer": self.cut_after,
            "cut_beginning": self.cut_before,
            "answer_tokens_lost": self.lost_answers,
            "split": self.split,
        }

    def notes(self, max_length: int) -> list[str]:
        """Return a sentence for each thing that was done; none if all rows fitted as they were."""
        said = []
        if self.dropped:
            where, tokens = self.dropped[0]
            said.append(
                f"{len(self.dropped):,} of {self.rows:,} rows left out: their answers end beyond "
                f"max_length {max_length:,} (the first: {where} with {tokens:,} tokens)"
            )
        if self.cut_after:
            said.append(
                f"{self.cut_after:,} of {self.rows:,} rows cut to max_length {max_length:,}, "
                f"after the answer"
            )
        if self.cut_before:
            lost = f", {self.lost_answers:,} answer tokens with it" if self.lost_answers else ""
            said.append(
                f"{self.cut_before:,} of {self.rows:,} rows lost their beginning{lost}: kept are "
                f"the last {max_length:,} tokens"
            )
        if self.split:
            said.append(
                f"{self.split:,} of {self.rows:,} rows of text split into pieces of {max_length:,} "
                f"tokens"
            )
        return said


def fit(
    examples: Sequence[Example],
    max_length: int,
    *,
    truncation: Truncation = "drop",
    first_id: int | None = None,
    reporter: Reporter = SILENT,
) -> Fitted:
    """Make examples fit into `max_length` tokens.

    An example that is too long only by what follows its last answer is cut there. Others are
    treated as `truncation` says, counted and reported:

    - `drop`: left out whole.
    - `error`: none may be too long.
    - `keep_end`: the beginning goes; a first token `first_id` stays.
    - `split`: text, all of which is learnt, goes on in a further example; others are left out.

    Args:
        examples: from `encode_rows`.
        max_length: tokens of an example at most.
        truncation: see above.
        first_id: the tokenizer's BOS, which a model may need.
        reporter: told what was done.

    Raises:
        DataError: not one example fits, or `truncation` is `error` and one does not; the message
            names file and line.
    """
    fitted = Fitted(rows=len(examples))
    for example in examples:
        length = len(example.input_ids)
        if length <= max_length:
            fitted.examples.append(example)
        elif not any(example.completion[max_length:]):
            fitted.examples.append(example.part(0, max_length))
            fitted.cut_after += 1
        elif truncation == "error":
            raise DataError(
                f"{example.where}: {length:,} tokens do not fit into max_length {max_length:,}; "
                f"raise data.max_length, or let data.truncation say what to do"
            )
        elif truncation == "keep_end":
            _keep_end(example, max_length, first_id, fitted)
        elif truncation == "split" and all(example.completion):
            pieces = range(0, length, max_length)
            fitted.examples += [example.part(start, start + max_length) for start in pieces]
            fitted.split += 1
        else:
            fitted.dropped.append((example.where, length))
    if fitted.dropped and not fitted.examples:
        where, length = fitted.dropped[0]
        raise DataError(
            f"{where} with {length:,} tokens: no row fits into max_length {max_length:,}; raise "
            f"max_length, or see data.truncation"
        )
    for note in fitted.notes(max_length):
        reporter.note(note)
    return fitted


def _keep_end(example: Example, max_length: int, first_id: int | None, fitted: Fitted) -> None:
    # What follows the last answer goes first: the end of the row may be no answer at all.
    end = len(example.input_ids) - example.completion[::-1].index(True)
    start = end - max_length
    first = int(example.input_ids[0] == first_id)
    kept = example.part(0, end).without(first, first + start)
    fitted.examples.append(kept)
    fitted.cut_before += 1
    fitted.lost_answers += example.supervised - kept.supervised

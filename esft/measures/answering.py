"""A model's answers to the rows of a task set, as text, each beside its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from esft.data.example import Example
from esft.data.row import Row
from esft.errors import DataError
from esft.generation import generate_texts
from esft.measures.metric import Answer
from esft.progress import SILENT, Reporter


class Question(NamedTuple):
    """What a model is asked for a row.

    Attributes:
        row: of the task set.
        prompt: token ids up to where the answer starts.
        reference: the row's answer, without special tokens.
    """

    row: Row
    prompt: list[int]
    reference: str


def questions(rows: Sequence[Row], examples: Sequence[Example], tokenizer: Any) -> list[Question]:
    """Return what is asked for rows: the last answer of each, after all that comes before it.

    The prompt is made of the row's own tokens, as in training and for exact match, and so is the
    reference: it is what the tokenizer makes of the right tokens, as an answer is of the model's.

    Args:
        rows: of a task set.
        examples: the same in tokens.
        tokenizer: that they were made by.

    Raises:
        DataError: nothing comes before a row's answer, as in a row of plain text.
    """
    found = []
    for row, example in zip(rows, examples, strict=True):
        end = len(example.completion) - example.completion[::-1].index(True)
        flags = example.completion[:end][::-1]
        start = end - (flags.index(False) if False in flags else end)
        if not start:
            raise DataError(
                f"{row.where}: the row has no prompt, and so there is nothing for a model to answer"
            )
        answer = example.input_ids[start:end]
        reference = tokenizer.decode(answer, skip_special_tokens=True)
        found.append(Question(row, example.input_ids[:start], reference))
    return found


def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> list[Answer]:
    """Return a model's greedy answers; arguments as for `esft.generation.generate_texts`."""
    texts = generate_texts(
        model,
        tokenizer,
        [question.prompt for question in asked],
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        reporter=reporter,
    )
    return [
        Answer(question.row, text, question.reference)
        for question, text in zip(asked, texts, strict=True)
    ]

"""A run's task sets: read, turned into tokens, made into what a trainer draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.data.encode import Example, encode_rows
from esft.data.packing import TrainSet, pack, separate
from esft.data.rows import Row, read_rows
from esft.files import sha256_file
from esft.progress import SILENT, Reporter
from esft.recipe_sections import DataSpec


@dataclass(frozen=True)
class TaskData:
    """What a run learns from and is scored on.

    Attributes:
        rows: of the training set, as read; profiling draws from them.
        train_set: the training set in blocks or rows of tokens.
        eval_examples: the test rows; empty if the recipe names none.
        pad_id: fills the places after a row's end.
    """

    rows: list[Row]
    train_set: TrainSet
    eval_examples: list[Example]
    pad_id: int


def prepare(data: DataSpec, tokenizer: Any, *, reporter: Reporter = SILENT) -> TaskData:
    """Read the task sets that a recipe names and turn them into tokens.

    Args:
        data: the recipe's `data` section.
        tokenizer: a transformers tokenizer.
        reporter: told about progress, and about rows that do not fit.

    Raises:
        DataError: a row cannot be used; the message names file and line.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    rows = read_rows(data.train)
    examples = encode_rows(rows, tokenizer, reporter=reporter)
    # Padding is marked by position, never by id, so any id will do.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if data.packing:
        train_set = pack(
            examples, data.max_length, pad_id=pad_id, loss_on=data.loss_on, reporter=reporter
        )
    else:
        train_set = separate(examples, data.max_length, loss_on=data.loss_on, reporter=reporter)
    eval_examples = encode_rows(read_rows(data.eval), tokenizer) if data.eval else []
    return TaskData(rows, train_set, eval_examples, pad_id)


def data_identity(data: DataSpec) -> dict[str, Any]:
    """Return what must be the same for a run to go on: files' contents, not where they lie."""
    return data.model_dump(exclude={"train", "eval"}) | {
        "train": sha256_file(Path(data.train)),
        "eval": sha256_file(Path(data.eval)) if data.eval else None,
    }

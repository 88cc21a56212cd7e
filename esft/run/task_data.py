"""A run's task sets: read, turned into tokens, made into what a trainer draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from esft.data.bad_rows import BadRows
from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.fitting import Fitted, fit
from esft.data.packing import TrainSet, pack, separate
from esft.data.row import Row
from esft.data.sources import Source, SourceRows, identity, join, read_source
from esft.errors import DataError
from esft.progress import SILENT, Reporter
from esft.recipe_sections import DataSpec


@dataclass(frozen=True)
class TaskData:
    """What a run learns from and is scored on.

    Attributes:
        sources: where the training rows came from.
        eval_sources: where the test rows came from.
        rows: of the training set, as read; profiling draws from them.
        examples: these in tokens, before any was left out or cut.
        train_set: the training set in blocks or rows of tokens.
        fitted: the training set's rows before that, and what was done to those that were too long.
        eval_examples: the test rows; empty if the recipe names none.
        pad_id: fills the places after a row's end.
        bad_rows: what was skipped of either.
    """

    sources: list[SourceRows]
    eval_sources: list[SourceRows]
    rows: list[Row]
    examples: list[Example]
    train_set: TrainSet
    fitted: Fitted
    eval_examples: list[Example]
    pad_id: int
    bad_rows: BadRows


def prepare(data: DataSpec, tokenizer: Any, *, reporter: Reporter = SILENT) -> TaskData:
    """Read the task sets that a recipe names and turn them into tokens.

    Args:
        data: the recipe's `data` section.
        tokenizer: a transformers tokenizer.
        reporter: told about progress, the formats, rows that do not fit or were skipped, and test
            rows that are training rows, too.

    Raises:
        DataError: a row cannot be used, and may not be skipped; the message names file and line.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    bad_rows = BadRows(data.skip_bad)
    # All files are read before the first row is turned into tokens, which takes longer.
    sources = _read(data, "train", bad_rows, reporter)
    eval_sources = _read(data, "eval", bad_rows, reporter)
    rows, eval_rows = (
        join(read, strategy=data.stopping_strategy, seed=data.seed, reporter=reporter)
        for read in (sources, eval_sources)
    )
    examples = _encoded(rows, tokenizer, data, bad_rows, reporter)
    eval_examples = _encoded(eval_rows, tokenizer, data, bad_rows, SILENT)
    _report_overlap(examples, eval_examples, reporter)
    if bad_rows.skipped:
        reporter.note(f"{bad_rows.counted()} skipped (--skip-bad {data.skip_bad})")
        skipped = {row["where"] for row in bad_rows.skipped}
        rows = [row for row in rows if row.where not in skipped]
    # Padding is marked by position, never by id, so any id will do.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    fitted = fit(
        examples,
        data.max_length,
        truncation=data.truncation,
        first_id=tokenizer.bos_token_id,
        reporter=reporter,
    )
    if data.packing:
        train_set = pack(fitted.examples, data.max_length, pad_id=pad_id, loss_on=data.loss_on)
    else:
        train_set = separate(fitted.examples, data.max_length, loss_on=data.loss_on)
    return TaskData(
        sources=sources,
        eval_sources=eval_sources,
        rows=rows,
        examples=examples,
        train_set=train_set,
        fitted=fitted,
        eval_examples=eval_examples,
        pad_id=pad_id,
        bad_rows=bad_rows,
    )


def data_identity(data: DataSpec) -> dict[str, Any]:
    """Return what must be the same for a run to go on: files' contents, not where they lie.

    Of a set that is one file, its sha256; else what `esft.data.sources.identity` says of each
    source, numbered from 1.

    Raises:
        DataError: a source cannot be read.
    """
    return data.model_dump(exclude={"train", "eval"}) | {
        "train": _identity(data, "train"),
        "eval": _identity(data, "eval"),
    }


def _sources(data: DataSpec, which: Literal["train", "eval"]) -> list[Source]:
    return [Source(**spec.model_dump()) for spec in data.sources(which)]


def _identity(data: DataSpec, which: Literal["train", "eval"]) -> Any:
    found = [identity(source) for source in _sources(data, which)]
    if len(found) > 1:
        return {str(number): one for number, one in enumerate(found, start=1)}
    return found[0] if found else None


def _read(
    data: DataSpec, which: Literal["train", "eval"], bad_rows: BadRows, reporter: Reporter
) -> list[SourceRows]:
    sources = _sources(data, which)
    return [read_source(source, bad_rows=bad_rows, reporter=reporter) for source in sources]


def _encoded(
    rows: list[Row], tokenizer: Any, data: DataSpec, bad_rows: BadRows, reporter: Reporter
) -> list[Example]:
    examples = encode_rows(
        rows,
        tokenizer,
        loss_on=data.loss_on,
        last_turn_only=data.last_turn_only,
        append_eos=data.append_eos,
        bad_rows=bad_rows,
        reporter=reporter,
    )
    if rows and not examples:
        last = bad_rows.skipped[-1]
        raise DataError(f"{last['where']}: {last['reason']}; no row is left")
    return examples


def _report_overlap(train: list[Example], test: list[Example], reporter: Reporter) -> None:
    """Say how many test rows are training rows, token for token."""
    known = {tuple(example.input_ids) for example in test}
    seen = known.intersection(tuple(example.input_ids) for example in train)
    if count := sum(tuple(example.input_ids) in seen for example in test):
        reporter.note(
            f"{count:,} of {len(test):,} rows of data.eval are in data.train, too: what the model "
            f"scores on them says little about others"
        )

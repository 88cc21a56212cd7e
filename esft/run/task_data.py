"""A run's task sets: read, turned into tokens, made into what a trainer draws."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from esft.data.bad_rows import BadRows
from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.fitting import Fitted, fit
from esft.data.packing import TrainSet, pack, separate
from esft.data.row import Row
from esft.data.sources import Source, SourceRows, identity, join, read_source
from esft.errors import DataError
from esft.measures.domains import domains
from esft.progress import SILENT, Reporter
from esft.recipe_sections import DataSpec, EvaluationSpec, SourceSpec

Which = Literal["train", "eval", "test"]


class ScoredSet(NamedTuple):
    """Rows that a model is scored on, and the same in tokens; empty if a recipe names none."""

    rows: list[Row]
    examples: list[Example]


@dataclass(frozen=True)
class TaskData:
    """What a run learns from and is scored on.

    Attributes:
        sources: where the training rows came from.
        eval_sources: where the rows came from that are scored while training.
        test_sources: where the rows came from that are scored afterwards.
        rows: of the training set, as read; profiling draws from them.
        examples: these in tokens, before any was left out or cut.
        train_set: the training set in blocks or rows of tokens.
        fitted: the training set's rows before that, and what was done to those that were too long.
        eval: the rows that are scored while training.
        test: the rows that are scored afterwards.
        general: the rows of each of the other domains, in tokens.
        pad_id: fills the places after a row's end.
        bad_rows: what was skipped of any.
        tokenizer: that made the tokens.
    """

    sources: list[SourceRows]
    eval_sources: list[SourceRows]
    test_sources: list[SourceRows]
    rows: list[Row]
    examples: list[Example]
    train_set: TrainSet
    fitted: Fitted
    eval: ScoredSet
    test: ScoredSet
    pad_id: int
    bad_rows: BadRows
    tokenizer: Any
    general: dict[str, list[Example]] = field(default_factory=dict)


def prepare(
    data: DataSpec,
    tokenizer: Any,
    *,
    evaluation: EvaluationSpec | None = None,
    reporter: Reporter = SILENT,
) -> TaskData:
    """Read the task sets that a recipe names and turn them into tokens.

    Args:
        data: the recipe's `data` section.
        tokenizer: a transformers tokenizer.
        evaluation: the recipe's `evaluation` section: limits, and the other domains.
        reporter: told about progress, the formats, rows that do not fit or were skipped, and test
            rows that are training rows, too.

    Raises:
        DataError: a row cannot be used, and may not be skipped; the message names file and line.
            Or a source cannot be read.
        ModelError: the tokenizer has no end-of-sequence token.
    """
    evaluation = evaluation or EvaluationSpec()
    bad_rows = BadRows(data.skip_bad)
    # All files are read before the first row is turned into tokens, which takes longer.
    sources = _read(data, "train", bad_rows, reporter)
    eval_sources = _read(data, "eval", bad_rows, reporter)
    test_sources = _read(data, "test", bad_rows, reporter)
    general_rows = {
        name: read_source(source, bad_rows=bad_rows, reporter=reporter).rows
        for name, source in _domains(evaluation).items()
    }
    rows, eval_rows, test_rows = (
        join(read, strategy=data.stopping_strategy, seed=data.seed, reporter=reporter)
        for read in (sources, eval_sources, test_sources)
    )
    if data.eval_rows is not None:
        rows, eval_rows = _set_aside(rows, data.eval_rows, data.seed)
    examples = _encoded(rows, tokenizer, data, bad_rows, reporter)
    eval_examples, test_examples = (
        _encoded(scored[: evaluation.max_rows], tokenizer, data, bad_rows, SILENT)
        for scored in (eval_rows, test_rows)
    )
    plain = DataSpec(train=data.train)  # what is learnt of a task's rows is nothing to a domain
    general = {
        name: _encoded(found[: evaluation.general_max_rows], tokenizer, plain, bad_rows, SILENT)
        for name, found in general_rows.items()
    }
    for name, scored in (("eval", eval_examples), ("test", test_examples)):
        _report_overlap(examples, name, scored, reporter)
    if bad_rows.skipped:
        reporter.note(f"{bad_rows.counted()} skipped (--skip-bad {data.skip_bad})")
    rows = _without(bad_rows, rows)
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
        test_sources=test_sources,
        rows=rows,
        examples=examples,
        train_set=train_set,
        fitted=fitted,
        eval=ScoredSet(_without(bad_rows, eval_rows[: evaluation.max_rows]), eval_examples),
        test=ScoredSet(_without(bad_rows, test_rows[: evaluation.max_rows]), test_examples),
        general=general,
        pad_id=pad_id,
        bad_rows=bad_rows,
        tokenizer=tokenizer,
    )


def _set_aside(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off some training rows, drawn by a seed, to be scored instead of learnt.

    Returns:
        the others, and those; each in the order that they were in.
    """
    if count >= len(rows):
        raise DataError(
            f"data.eval_rows: {count:,} of {len(rows):,} training rows; some must be left to learn"
        )
    drawn = set(random.Random(seed).sample(range(len(rows)), count))
    left = [row for place, row in enumerate(rows) if place not in drawn]
    return left, [rows[place] for place in sorted(drawn)]


def data_identity(data: DataSpec) -> dict[str, Any]:
    """Return what must be the same for a run to go on: files' contents, not where they lie.

    Of a set that is one file, its sha256; else what `esft.data.sources.identity` says of each
    source, numbered from 1.

    Raises:
        DataError: a source cannot be read.
    """
    return data.model_dump(exclude={"train", "eval", "test"}) | {
        "train": _identity(data, "train"),
        "eval": _identity(data, "eval"),
        "test": _identity(data, "test"),
    }


def general_identity(evaluation: EvaluationSpec) -> dict[str, Any]:
    """Return the same of the other domains, by name; errors as for `data_identity`."""
    return {name: identity(source) for name, source in _domains(evaluation).items()}


def _domains(evaluation: EvaluationSpec) -> Mapping[str, Source]:
    general = evaluation.general
    if general is None:
        return {}
    if isinstance(general, str):
        return domains(general)
    specs = {
        name: SourceSpec(path=given) if isinstance(given, str) else given
        for name, given in general.items()
    }
    return domains(
        {
            name: Source(**spec.model_dump() | {"format": spec.format or "auto"})
            for name, spec in specs.items()
        }
    )


def _sources(data: DataSpec, which: Which) -> list[Source]:
    return [Source(**spec.model_dump()) for spec in data.sources(which)]


def _identity(data: DataSpec, which: Which) -> Any:
    found = [identity(source) for source in _sources(data, which)]
    if len(found) > 1:
        return {str(number): one for number, one in enumerate(found, start=1)}
    return found[0] if found else None


def _read(data: DataSpec, which: Which, bad_rows: BadRows, reporter: Reporter) -> list[SourceRows]:
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


def _without(bad_rows: BadRows, rows: list[Row]) -> list[Row]:
    """Return rows less those that were skipped, so that they are as many as their examples."""
    skipped = {row["where"] for row in bad_rows.skipped}
    return [row for row in rows if row.where not in skipped]


def _report_overlap(
    train: list[Example], name: str, test: list[Example], reporter: Reporter
) -> None:
    """Say how many rows that are scored are training rows, token for token."""
    known = {tuple(example.input_ids) for example in test}
    seen = known.intersection(tuple(example.input_ids) for example in train)
    if count := sum(tuple(example.input_ids) in seen for example in test):
        reporter.note(
            f"{count:,} of {len(test):,} rows of data.{name} are in data.train, too: what the "
            f"model scores on them says little about others"
        )

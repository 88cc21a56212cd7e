"""The tables of a comparison as a report's: methods, figures, claims, runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from esft.comparison import table as measured
from esft.comparison.claims import DID_NOT_HOLD, HELD, Claim, Verdict
from esft.comparison.claims import Finding as Judged
from esft.comparison.gathering import log_file
from esft.comparison.methods import METHODS
from esft.comparison.records import Comparison, RunRecord
from esft.report.numerals import count, duration, rate, share
from esft.report.page import Cell, Finding, Table

_NOTHING = "–"
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
_GOOD: dict[Verdict, bool | None] = {HELD: True, DID_NOT_HOLD: False}


def page_table(
    table: measured.Table,
    groups: Sequence[str] | None = None,
    title: str | None = None,
    notes: Sequence[str] | None = None,
) -> Table:
    """Return a comparison's table as a report's: means, the spread below them.

    Args:
        table: the figures.
        groups: take only the columns below these heads; None takes all.
        title: another than the table's, for a part of it; notes likewise.

    Returns:
        a table, which has no row where nothing was measured.
    """
    kept = [
        place
        for place, column in enumerate(table.columns)
        if groups is None or column.group in groups
    ]
    rows = []
    for row in table.rows:
        given = list(table.cells(row))
        cells = [_cell(*given[place]) for place in kept]
        if any(cell.text != _NOTHING for cell in cells):
            rows.append([Cell(row.name), *cells])
    heads, groups_above = _heads([table.columns[place] for place in kept])
    return Table(
        title=title or table.title,
        columns=["", *heads],
        rows=rows,
        notes=table.notes if notes is None else notes,
        groups=[("", 1), *groups_above],
    )


def methods_table(comparison: Comparison) -> Table:
    """Return what each method trains, the learning rates it was tried with, and the chosen ones."""
    columns = ["method", "what trains", "learning rates tried"]
    columns += [f"chosen for {task}" for task in comparison.tasks]
    rows = []
    for method in comparison.methods:
        records = [r for r in comparison.records if r.method == method and not r.sweep]
        rates = sorted({record.learning_rate for record in records})
        cells = [method, _description(comparison, method), ", ".join(map(rate, rates))]
        for task in comparison.tasks:
            chosen = {r.learning_rate for r in records if r.task == task and r.chosen}
            cells.append(", ".join(map(rate, sorted(chosen))) or _NOTHING)
        rows.append([Cell(text) for text in cells])
    notes = [
        "All methods learn from the same rows, in the same batches and order. A learning rate is "
        "chosen by the score on the validation rows; the test rows are scored once, after that.",
    ]
    return Table("Methods", columns, rows, notes)


def findings(claims: Iterable[Claim]) -> list[Finding]:
    """Return the claims with their verdicts, and the differences over all tasks that say so."""
    return [
        Finding(
            claim=f"Claim {claim.number}: {claim.text}.",
            verdict=claim.verdict,
            good=_GOOD.get(claim.verdict),
            evidence=[_evidence(found) for found in claim.findings if found.task is None]
            or ["The methods that it is about were not compared."],
        )
        for claim in claims
    ]


def claim_tables(claims: Iterable[Claim], tasks: Sequence[str]) -> list[Table]:
    """Return for each claim every difference that it rests on, task by task."""
    places: list[str | None] = [*tasks, *([None] if len(tasks) > 1 else [])]
    tables = []
    for claim in claims:
        by_place = {(f.method, f.reference, f.task): f for f in claim.findings}
        rows = []
        for one, other in dict.fromkeys((f.method, f.reference) for f in claim.findings):
            found = [by_place[one, other, place] for place in places]
            cells = [Cell(_difference(each), details=[each.verdict]) for each in found]
            rows.append([Cell(f"{one} − {other}"), *cells])
        title = f"Claim {claim.number}: {claim.text}"
        columns = ["", *(place or "average" for place in places)]
        tables += [Table(title, columns, rows)] if rows else []
    return tables


def runs_table(comparison: Comparison, folder: Path, out: Path) -> Table:
    """Return a row for every run, each leading to its folder.

    Args:
        comparison: has the runs.
        folder: of the comparison.
        out: of the report, which links are relative to.
    """
    swept = any(record.sweep for record in comparison.records)
    columns = ["run", "task", "method", "rate", "seed", *(["swept"] if swept else [])]
    columns += [comparison.metric.replace("_", " "), "general loss", "trained", "time", "state"]
    rows = []
    for number, record in enumerate(comparison.records, start=1):
        cells = [record.task, record.method, rate(record.learning_rate), str(record.seed)]
        if swept:
            cells.append(", ".join(f"{k} {v:g}" for k, v in record.sweep.items()) or _NOTHING)
        cells += [*_results(record, comparison.metric), _state(record)]
        rows.append([_run(number, record, folder, out), *map(Cell, cells)])
    notes = [
        "Each number leads to the run's folder, which has its recipe, metrics, result and delta; "
        "of a run that failed, to what it printed. "
        "Chosen: with the learning rate that the validation rows chose.",
    ]
    return Table("Runs, in the order in which they were planned", columns, rows, notes)


def failed_table(comparison: Comparison, folder: Path, out: Path) -> Table | None:
    """Return the runs that failed and why; None if there are none."""
    rows = [
        [
            _run(number, record, folder, out),
            *map(
                Cell,
                (record.task, record.method, rate(record.learning_rate), str(record.seed)),
            ),
            Cell(record.error),
        ]
        for number, record in enumerate(comparison.records, start=1)
        if record.error is not None
    ]
    columns = ["run", "task", "method", "rate", "seed", "reason"]
    return Table("Runs that failed", columns, rows) if rows else None


def _cell(column: measured.Column, cell: measured.Cell) -> Cell:
    mean, _, spread = column.text(cell).partition(" ± ")
    details = [f"± {spread}"] if spread else []
    if interval := column.interval(cell):
        details.append(interval)
    mean, *details = (text.replace("-", "−") for text in (mean, *details))
    return Cell(mean, best=cell.best, mark=cell.mark, details=details)


def _heads(columns: Sequence[measured.Column]) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the columns' heads, and those above them with the number of columns below each.

    What all columns of a group have in common, the unit of losses and which way is good, is told
    once, above them.
    """
    heads, groups = [], []
    for name, below in itertools.groupby(columns, key=lambda column: column.group):
        members = list(below)
        losses = all(column.unit == "nats" for column in members)
        better = {column.better for column in members}
        common = _ARROWS[better.pop()] if len(better) == 1 else ""
        groups.append((f"{name}{', nats' * losses}{common}", len(members)))
        for column in members:
            head = column.heading.replace(" (nats)", "") if losses else column.heading
            heads.append(head.removesuffix(common) if common else head)
    return heads, groups


def _description(comparison: Comparison, method: str) -> str:
    """Describe a method: one of esft's, or the recipe's own."""
    if method in METHODS:
        return METHODS[method].description
    given = comparison.recipe.get("compare", {}).get("methods")
    entry: Any = given.get(method) if isinstance(given, Mapping) else None
    like = entry.get("like") if isinstance(entry, Mapping) else None
    return f"as {like}, with keys of its own (see the recipe)" if like else "see the recipe"


def _difference(found: Judged) -> str:
    if found.difference is None:
        return _NOTHING
    column = measured.Column("", "", "", found.unit, signed=True)
    text = column.text(measured.Cell(found.difference.mean, found.difference.spread))
    return text.replace("-", "−")


def _evidence(found: Judged) -> str:
    pair = f"{found.method} − {found.reference}"
    if found.difference is None:
        return f"{pair}: {found.verdict}"
    unit = {"score": " points", "nats": " nats a token"}.get(found.unit, "")
    return f"{pair}: {_difference(found)}{unit}, {found.verdict}"


def _results(record: RunRecord, metric: str) -> list[str]:
    found = record.outcome
    if found is None:
        return [_NOTHING] * 4
    score = found.scores.get(metric)
    return [
        _NOTHING if score is None else share(score.value),
        f"{found.general_loss:.3f}" if found.general else _NOTHING,
        count(found.trained),
        duration(found.seconds),
    ]


def _state(record: RunRecord) -> str:
    if record.error is not None:
        return "failed"
    if record.outcome is None:
        return "not ended"
    return "chosen" if record.chosen and not record.sweep else "ended"


def _run(number: int, record: RunRecord, folder: Path, out: Path) -> Cell:
    """Return a run's number, leading to its folder, or to what it printed if it failed."""
    place = folder / record.folder
    target = log_file(place) if log_file(place).is_file() and record.error else place
    return Cell(str(number), href=quote(Path(os.path.relpath(target, out)).as_posix()))

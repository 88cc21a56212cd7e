"""The report of a comparison: what methods give, keep and cost, and what that says of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from esft.comparison import table as measured
from esft.comparison.claims import Claim, judge
from esft.comparison.records import Comparison
from esft.comparison.series import sweep_tables
from esft.comparison.summary import paired_table, summary_table, tradeoff_table
from esft.recipe_text import to_yaml
from esft.report import comparison_charts as charts
from esft.report.chart import Chart
from esft.report.comparison_tables import (
    claim_tables,
    failed_table,
    findings,
    methods_table,
    page_table,
    runs_table,
)
from esft.report.page import Block, Facts, Findings, Listing, Page, Pictures, Section, Table, Text

COST = "cost"  # the group of columns in the summary table


def comparison_page(comparison: Comparison, folder: Path, out: Path, made_by: str) -> Page:
    """Return the report of a comparison.

    Args:
        comparison: what was measured.
        folder: of the comparison, which has the runs' folders.
        out: of the report, which links are relative to.
        made_by: the version that writes it.
    """
    claims = judge(comparison)
    summary = summary_table(comparison)
    return Page(
        kind="comparison",
        title=f"{comparison.model}: {len(comparison.methods)} methods on "
        + (comparison.tasks[0] if len(comparison.tasks) == 1 else f"{len(comparison.tasks)} tasks"),
        lead=_lead(comparison),
        sections=[
            Section("claims", "In short", _claims(claims)),
            Section("setting", "What was compared", _setting(comparison)),
            Section("tradeoff", "Learning against forgetting", _tradeoff(comparison)),
            Section(
                "scores", "Scores", [*_scores(summary), *_pictures(charts.results(comparison))]
            ),
            Section("differences", "Differences", _tables(page_table(paired_table(comparison)))),
            Section("costs", "Costs", [*_costs(summary), *_pictures(charts.costs(comparison))]),
            Section("evidence", "The claims, task by task", _evidence(claims, comparison)),
            Section("curves", "While they learnt", _learning(comparison, folder)),
            Section("sweeps", "Other settings", _sweeps(comparison)),
            Section("experts", "Experts", _experts(comparison, folder)),
            Section("failed", "Failed runs", _tables(failed_table(comparison, folder, out))),
            Section("runs", "Every run", [runs_table(comparison, folder, out)]),
            Section("recipe", "The recipe", [Listing("compare.yaml", to_yaml(comparison.recipe))]),
        ],
        made_by=made_by,
    )


def _lead(comparison: Comparison) -> str:
    methods, tasks = ", ".join(comparison.methods), ", ".join(comparison.tasks)
    return (
        f"The same recipe trained by {methods}, on {tasks}: what each method scores on its task, "
        f"what it keeps of everything else, and what it costs."
    )


def _claims(claims: Iterable[Claim]) -> list[Block]:
    told = (
        "What the runs say of the claims of the paper (arXiv 2407.01906), over all tasks. The "
        "differences are between runs with the same seed, their mean ± their spread."
    )
    return [Text(told), Findings(findings(claims))]


def _setting(comparison: Comparison) -> list[Block]:
    records = comparison.records
    ended = sum(record.outcome is not None for record in records)
    failed = sum(record.error is not None for record in records)
    open_ = len(records) - ended - failed
    counts = [f"{ended} ended", *[f"{failed} failed"] * bool(failed)]
    counts += [f"{open_} not ended"] * bool(open_)
    facts = [
        ("model", comparison.model),
        ("tasks", ", ".join(comparison.tasks)),
        ("score", comparison.metric.replace("_", " ")),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("runs", f"{len(records)}: {', '.join(counts)}"),
        *comparison.versions.items(),
    ]
    return [Facts(facts), methods_table(comparison)]


def _tradeoff(comparison: Comparison) -> list[Block]:
    told = (
        "A method that learns less also forgets less, so the end of training does not tell which "
        "keeps more. Here each is compared at equal score while it learns: lines that run lower "
        "forget less on the way to the same score."
    )
    return [
        Text(told),
        *_pictures(charts.tradeoffs(comparison)),
        *_tables(page_table(tradeoff_table(comparison))),
    ]


def _scores(summary: measured.Table) -> list[Block]:
    groups = [column.group for column in summary.columns if column.group != COST]
    return _tables(page_table(summary, groups, "What methods score and keep"))


def _costs(summary: measured.Table) -> list[Block]:
    notes = ["Means over tasks and seeds; spread and marks as in the table of the scores."]
    return _tables(page_table(summary, [COST], "What methods cost", notes))


def _learning(comparison: Comparison, folder: Path) -> list[Block]:
    drawn = [charts.learning(comparison, task, folder) for task in comparison.tasks]
    return [block for group in drawn for block in _pictures(group)]


def _sweeps(comparison: Comparison) -> list[Block]:
    tables = (page_table(table) for table in sweep_tables(comparison))
    return [*_pictures(charts.sweeps(comparison)), *(block for t in tables for block in _tables(t))]


def _experts(comparison: Comparison, folder: Path) -> list[Block]:
    drawn = [charts.experts(comparison, task, folder) for task in comparison.tasks]
    drawn.append(charts.overlaps(comparison))
    return [block for group in drawn for block in _pictures(group)]


def _evidence(claims: Iterable[Claim], comparison: Comparison) -> list[Block]:
    told = (
        "Every difference that a verdict rests on, between runs with the same seed: mean ± spread, "
        "scores in points, losses in nats a token. A claim held where the mean is on its side of "
        "the threshold by more than the spread, and did not hold where it is as far on the other "
        "side; in between it is undecided. The claim as a whole is judged by the averages."
    )
    return [Text(told), *claim_tables(claims, comparison.tasks)]


def _tables(table: Table | None) -> list[Block]:
    return [table] if table is not None and table.rows else []


def _pictures(drawn: Sequence[Chart]) -> list[Block]:
    return [Pictures(drawn)] if drawn else []

"""The tables of a comparison: what methods score and cost, what they forget, how pairs differ.

The first one has the paper's layout (arXiv 2407.01906, tables 1 and 2): methods down; the score of
each task and their average; the general loss of each domain and their average; then the costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from esft.comparison import figures, tradeoff
from esft.comparison.figures import Figure, by_seed, of_base
from esft.comparison.records import Comparison
from esft.comparison.roles import pairs
from esft.comparison.statistics import Difference, Summary, paired
from esft.comparison.table import MARK, Cell, Column, Row, Table

BASE = "base"
_AVERAGE = "average"
_MEANS = (
    "Mean ± spread over seeds (the standard deviation with n − 1). An average over tasks is taken "
    "within each seed first; a seed that lacks a task does not count in it."
)


def summary_table(comparison: Comparison) -> Table:
    """Return the summary table: methods down; scores, general losses and costs across."""
    tasks = comparison.tasks
    score = figures.score(comparison.metric)
    columns = _by_task("task score", score, tasks)
    for domain in figures.domains(comparison):
        columns.append(_averaged("general loss", figures.general(domain), tasks))
    if figures.domains(comparison):
        columns.append(_averaged("general loss", figures.general_average(), tasks))
    columns += [_averaged("cost", figure, tasks) for figure in figures.costs()]
    notes = [
        f"Task score: {score.title} on the test rows. General loss: on held-out text of other "
        f"domains, in nats a token, the mean over tasks. Costs: the mean over tasks.",
        _MEANS,
        _marks(),
        *_missing(comparison),
    ]
    return _table(comparison, "summary", "What methods score, keep and cost", columns, notes)


def overview_table(comparison: Comparison) -> Table:
    """Return a table narrow enough for a terminal: averages over tasks, and what a run costs."""
    costs = [cost for cost in figures.costs() if cost.key in ("trained", "bytes", "step_seconds")]
    columns = [_averaged("", figures.score(comparison.metric), comparison.tasks)]
    if figures.domains(comparison):
        general = figures.general_average()
        columns.append(_averaged("", general, comparison.tasks, "general loss"))
    columns += [_averaged("", cost, comparison.tasks) for cost in costs]
    title = f"{', '.join(comparison.tasks)}: {len(comparison.seeds)} seeds"
    return _table(comparison, "overview", title, columns, [_marks(), *_missing(comparison)])


def tradeoff_table(
    comparison: Comparison, fractions: Sequence[float] = tradeoff.FRACTIONS
) -> Table:
    """Return what methods forget at equal task score, at fractions of each task's range."""
    tasks = comparison.tasks
    columns = _by_task("over the range of scores", tradeoff.forgotten_on_average(comparison), tasks)
    for fraction in fractions:
        columns.append(_averaged("at a score", tradeoff.forgotten_at(comparison, fraction), tasks))
    columns.append(_averaged("at the end", tradeoff.forgotten_at_end(comparison), tasks, "average"))
    notes = [
        "General loss above the base's, in nats a token, when a run first reaches a score on the "
        "validation rows (linear between evaluations). Less is better.",
        *(_range_note(comparison, task) for task in tasks),
        _MEANS,
        _marks(),
    ]
    return _table(comparison, "tradeoff", "What is forgotten at equal task score", columns, notes)


def paired_table(comparison: Comparison) -> Table:
    """Return the paired comparisons: every method against `full`, and ESFT against chance."""
    tasks = comparison.tasks
    score = figures.score(comparison.metric)
    wide: list[tuple[Column, Callable[[str, str], Difference | None]]] = []

    def add(group: str, figure: Figure, over: Sequence[str], title: str) -> None:
        column = Column(_key(figure, title), group, title, figure.unit, figure.better, signed=True)
        wide.append(
            (
                column,
                lambda one, other: paired(
                    by_seed(comparison, one, figure, over),
                    by_seed(comparison, other, figure, over),
                ),
            )
        )

    for task in tasks:
        add("task score", score, [task], task)
    if len(tasks) > 1:
        add("task score", score, tasks, _AVERAGE)
    add("test loss", figures.task_loss(), tasks, _AVERAGE)
    add("general loss", figures.general_average(), tasks, "at the end")
    column = Column("gap", "general loss", "at equal score", "nats", "lower", signed=True)
    wide.append((column, lambda one, other: tradeoff.gap(comparison, one, other, tasks)))
    rows = [
        Row(f"{one} − {other}", tuple(_difference(read(one, other)) for _, read in wide))
        for one, other in pairs(comparison.methods)
    ]
    notes = (
        "Mean of the differences of runs with the same seed, ± their spread; below the 95 % "
        "confidence interval by Student's t, which is wide for three seeds.",
        "At equal score: the mean difference in general loss over the scores that both runs of a "
        "pair reach.",
        f"{MARK}: further from 0 than the spread.",
    )
    return Table(
        key="paired",
        title="Differences between methods, paired by seed",
        columns=tuple(column for column, _ in wide),
        rows=tuple(rows),
        notes=notes,
    )


def tables(comparison: Comparison) -> list[Table]:
    """Return all tables of a comparison, in the report's order."""
    return [summary_table(comparison), tradeoff_table(comparison), paired_table(comparison)]


_Planned = tuple[Column, Figure, Sequence[str]]


def _by_task(group: str, figure: Figure, tasks: Sequence[str]) -> list[_Planned]:
    """Plan a column for each task, and one for their average if there is more than one task."""
    titles: list[tuple[str, Sequence[str]]] = [(task, [task]) for task in tasks]
    if len(tasks) > 1:
        titles.append((_AVERAGE, tasks))
    return [
        (Column(_key(figure, title), group, title, figure.unit, figure.better), figure, over)
        for title, over in titles
    ]


def _averaged(
    group: str, figure: Figure, tasks: Sequence[str], title: str | None = None
) -> _Planned:
    """Plan a column for a figure's mean over the tasks."""
    column = Column(figure.key, group, title or figure.title, figure.unit, figure.better)
    return column, figure, tasks


def _key(figure: Figure, title: str) -> str:
    return f"{figure.key}/{title}"


def _table(
    comparison: Comparison, key: str, title: str, planned: Sequence[_Planned], notes: Sequence[str]
) -> Table:
    by_column = [
        _column(
            {method: by_seed(comparison, method, figure, tasks) for method in comparison.methods},
            figure,
        )
        for _, figure, tasks in planned
    ]
    base = tuple(Cell(of_base(comparison, figure, tasks)) for _, figure, tasks in planned)
    rows = [Row(BASE, base)] if any(cell.value is not None for cell in base) else []
    rows += [
        Row(method, tuple(cells[method] for cells in by_column)) for method in comparison.methods
    ]
    return Table(key, title, tuple(column for column, _, _ in planned), tuple(rows), tuple(notes))


def _column(values: Mapping[str, Mapping[int, float]], figure: Figure) -> dict[str, Cell]:
    """Return a column's cells by method, the best marked and what differs from it."""
    found = {method: Summary.of(list(seeds.values())) for method, seeds in values.items() if seeds}
    sign = 1 if figure.better == "higher" else -1
    top = max((sign * summary.mean for summary in found.values()), default=0.0)
    # Equal means are equally good; what differs is told against the first of them.
    best = [method for method, summary in found.items() if sign * summary.mean == top]
    cells = {}
    for method in values:
        if method not in found:
            cells[method] = Cell()
            continue
        apart = None if method in best else paired(values[method], values[best[0]])
        cells[method] = Cell(
            value=found[method].mean,
            spread=found[method].spread,
            count=found[method].count,
            best=method in best,
            differs=None if apart is None else apart.exceeds_spread,
        )
    return cells


def _difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell()
    return Cell(
        value=found.mean,
        spread=found.spread,
        count=found.pairs,
        differs=found.exceeds_spread,
        low=found.low,
        high=found.high,
    )


def _marks() -> str:
    return (
        f"Bold: the best of the column. {MARK}: differs from it by more than the spread of the "
        f"differences between runs with the same seed."
    )


def _missing(comparison: Comparison) -> list[str]:
    """Say which runs the means lack."""
    wanted = len(comparison.seeds)
    told = []
    for method in comparison.methods:
        ended = {task: len(comparison.of(task, method)) for task in comparison.tasks}
        lacking = [f"{task} ({n} of {wanted})" for task, n in ended.items() if n < wanted]
        if not any(ended.values()):
            told.append(f"{method} (all)")
        elif lacking:
            told.append(f"{method} on {', '.join(lacking)}")
    return [f"Runs that failed or have not ended are missing: {'; '.join(told)}."] if told else []


def _range_note(comparison: Comparison, task: str) -> str:
    found = tradeoff.task_range(comparison, task)
    if found is None:
        return f"{task}: no run was evaluated while it learnt, or no general loss was measured."
    text = f"{task}: scores from {100 * found.low:.1f} to {100 * found.high:.1f}"
    if found.left_out:
        text += (
            f"; {', '.join(found.left_out)} did not get half of the way to the highest score and "
            f"did not count for the range"
        )
    return text + "."

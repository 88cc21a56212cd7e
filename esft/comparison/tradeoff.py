"""What methods have forgotten at equal task score: at some scores, and on average over a range.

The range of a task goes from the score of the untrained model (the highest among first
evaluations) to the highest score that all runs reach of all methods that learn the task. A method
learns it if each of its runs gets at least half of the way from there to the highest score of any
run: one that does not would narrow the range to nothing for the rest, and has no figures itself
where it does not get to. Levels are fractions of the range, so that every method that learns the
task reaches each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esft.comparison.curve import Curve, curve
from esft.comparison.figures import Figure
from esft.comparison.records import Comparison, RunRecord
from esft.comparison.statistics import Difference

FRACTIONS = (0.5, 0.8, 0.9)
_LEARNT = 0.5  # of the way to the highest score


@dataclass(frozen=True)
class ScoreRange:
    """The scores of a task at which methods are compared.

    Attributes:
        low: the untrained model's.
        high: the highest one that every run reaches, of the methods that learn the task.
        left_out: the methods that do not, in the comparison's order.
    """

    low: float
    high: float
    left_out: tuple[str, ...]

    def level(self, fraction: float) -> float:
        """Return the score at a fraction of the range."""
        return self.low + fraction * (self.high - self.low)


def score_range(curves: Mapping[str, Sequence[Curve]]) -> ScoreRange | None:
    """Return the range of scores at which methods can be compared on a task.

    Args:
        curves: by method, those of its runs; a method without any has no say.

    Returns:
        None if nothing was evaluated, or no run has learnt anything.
    """
    starts = [one.start for runs in curves.values() for one in runs]
    weakest = {method: min(one.best for one in runs) for method, runs in curves.items() if runs}
    if not starts:
        return None
    low, top = max(starts), max(one.best for runs in curves.values() for one in runs)
    needed = low + _LEARNT * (top - low)
    reached = [best for best in weakest.values() if best >= needed]
    if top <= low or not reached:
        return None
    left_out = tuple(method for method, best in weakest.items() if best < needed)
    return ScoreRange(low, min(reached), left_out)


def task_range(comparison: Comparison, task: str) -> ScoreRange | None:
    """Return the range of scores at which a comparison's methods are compared on a task."""
    return score_range({method: _curves(comparison, task, method) for method in comparison.methods})


def task_ranges(comparison: Comparison) -> dict[str, ScoreRange | None]:
    """Return every task's range."""
    return {task: task_range(comparison, task) for task in comparison.tasks}


def forgotten_at(comparison: Comparison, fraction: float) -> Figure:
    """Return the figure: what is forgotten when a fraction of the task's range is reached.

    In nats a token of general loss above the base's.
    """
    ranges = task_ranges(comparison)

    def read(record: RunRecord) -> float | None:
        found, scores = curve(comparison, record), ranges[record.task]
        return None if found is None or scores is None else found.at(scores.level(fraction))

    title = f"at {fraction:.0%} of the range"
    return Figure(f"forgotten_at_{fraction:g}", title, "nats", "lower", read)


def forgotten_on_average(comparison: Comparison) -> Figure:
    """Return the figure: what is forgotten on average over the task's range.

    In nats a token: the area between the run's curve and the base's general loss, divided by the
    width of the range.
    """
    ranges = task_ranges(comparison)

    def read(record: RunRecord) -> float | None:
        found, scores = curve(comparison, record), ranges[record.task]
        return None if found is None or scores is None else found.mean(scores.low, scores.high)

    return Figure("forgotten", "over the range", "nats", "lower", read)


def forgotten_at_end(comparison: Comparison) -> Figure:
    """Return the figure: what is forgotten when training ends, whatever the score is then."""

    def read(record: RunRecord) -> float | None:
        base = comparison.base.get(record.task)
        if base is None or not base.general or not record.outcome or not record.outcome.general:
            return None
        return record.outcome.general_loss - base.general_loss

    return Figure("forgotten_at_end", "at the end", "nats", "lower", read)


def gap(
    comparison: Comparison, method: str, reference: str, tasks: Sequence[str]
) -> Difference | None:
    """Return how much more one method forgets than another at equal score, paired by seed.

    Each pair of runs is compared over the range of scores that both of them reach, so that what a
    third method reaches does not matter. In nats a token; below 0 the method forgets less.

    Args:
        comparison: has the runs.
        method: the one.
        reference: the other.
        tasks: averaged within a seed; a seed that lacks one of them does not count.

    Returns:
        None if no seed has a pair of runs on every task.
    """
    found: dict[int, list[float]] = {}
    for task in tasks:
        ones, others = (
            {record.seed: curve(comparison, record) for record in comparison.of(task, name)}
            for name in (method, reference)
        )
        for seed, one in ones.items():
            other = others.get(seed)
            if one is None or other is None:
                continue
            low, high = max(one.start, other.start), min(one.best, other.best)
            forgotten, by_other = one.mean(low, high), other.mean(low, high)
            if forgotten is not None and by_other is not None:
                found.setdefault(seed, []).append(forgotten - by_other)
    means = [sum(gaps) / len(gaps) for gaps in found.values() if len(gaps) == len(tasks)]
    return Difference.of(means) if means else None


def _curves(comparison: Comparison, task: str, method: str) -> list[Curve]:
    found = (curve(comparison, record) for record in comparison.of(task, method))
    return [one for one in found if one is not None]

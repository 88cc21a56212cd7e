"""A run's curve: what it has forgotten against what it has learnt, evaluation by evaluation.

Methods learn at different speeds, and one that learns more slowly also forgets more slowly. So
they are compared at equal score: at the first moment at which a run reaches it. Between two
evaluations both figures are taken to change linearly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from esft.comparison.records import Comparison, RunRecord


@dataclass(frozen=True)
class Curve:
    """One run's evaluations in the order of steps, at least one.

    Attributes:
        scores: on the validation rows; higher is better.
        forgotten: general loss above the base's, in nats a token; lower is better.
    """

    scores: tuple[float, ...]
    forgotten: tuple[float, ...]

    @property
    def start(self) -> float:
        """The score of the first evaluation."""
        return self.scores[0]

    @property
    def best(self) -> float:
        """The highest score."""
        return max(self.scores)

    def at(self, score: float) -> float | None:
        """Return what is forgotten when a score is first reached, in nats a token.

        Below the first evaluation's score that is what is forgotten there; None if the score is
        never reached.
        """
        if score <= self.start:
            return self.forgotten[0]
        for low, first, high, last in self._rises():
            if score <= high:
                return _between(low, first, high, last, score)
        return None

    def mean(self, low: float, high: float) -> float | None:
        """Return the mean of `at` over a range of scores, in nats a token.

        It is the area between the curve and the base's general loss, divided by the range's width.

        Returns:
            None if the range is empty, or the run does not reach its end.
        """
        if high <= low or high > self.best:
            return None
        area = self.forgotten[0] * max(0.0, min(high, self.start) - low)
        for left, first, right, last in self._rises():
            start, end = max(left, low), min(right, high)
            if start < end:
                ends = [_between(left, first, right, last, score) for score in (start, end)]
                area += sum(ends) / 2 * (end - start)
        return area / (high - low)

    def _rises(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield the pieces on which the score is higher than ever before.

        Each is (score, forgotten) where it begins, and where it ends. The scores of one end are
        those at which the next begins; what is forgotten may jump there, if the score fell
        meanwhile.
        """
        top = self.start
        steps = zip(self.scores, self.forgotten, self.scores[1:], self.forgotten[1:], strict=False)
        for low, first, high, last in steps:
            if high > top:
                yield top, _between(low, first, high, last, top), high, last
                top = high


def curve(comparison: Comparison, record: RunRecord) -> Curve | None:
    """Return a run's curve; None if it was never evaluated, or no general loss was measured."""
    base = comparison.base.get(record.task)
    metric = comparison.metric
    points = [point for point in record.points if point.general and metric in point.scores]
    if base is None or not base.general or not points:
        return None
    return Curve(
        scores=tuple(point.scores[metric] for point in points),
        forgotten=tuple(point.general_loss - base.general_loss for point in points),
    )


def _between(low: float, first: float, high: float, last: float, score: float) -> float:
    """Interpolate linearly from (low, first) to (high, last)."""
    share = (score - low) / (high - low)
    return first * (1 - share) + last * share

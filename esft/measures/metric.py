"""The metrics that answers are scored by; of each, more is better, from 0 to 1."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from esft.errors import EsftError

if TYPE_CHECKING:
    from esft.data.row import Row
    from esft.measures.interval import Figure, Interval

MetricName = Literal["exact_match", "json_equal", "chrf", "bleu", "rouge_l", "pass_at_1"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
# What pip installs -> what is imported, for those that need more than esft does.
_LIBRARIES: dict[str, tuple[str, str]] = {
    "chrf": ("sacrebleu", "sacrebleu"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "rouge_l": ("rouge-score", "rouge_score"),
}


class Answer(NamedTuple):
    """What a model wrote for a row, beside what it should have written.

    Attributes:
        row: of the task set.
        text: the model's answer, without special tokens.
        reference: the row's, likewise.
    """

    row: Row
    text: str
    reference: str


@dataclass(frozen=True)
class Scores:
    """One metric's scores of R rows.

    Attributes:
        rows: each row's own score.
        sums: `[R, C]`: what the figure of the whole set is computed from, summed over the rows;
            None where the figure is the mean of `rows`.
        figure: makes the figure of the C sums.
    """

    rows: list[float]
    sums: Any = None
    figure: Figure | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """The figure of the whole set."""
        if self.figure is None:
            return sum(self.rows) / len(self.rows)
        return self.figure(self.sums.sum(axis=0))

    def interval(self, *, seed: int = 0) -> Interval:
        """Return the figure with its 95 % bootstrap confidence interval over the rows."""
        from esft.measures.interval import mean_interval, sums_interval

        if self.figure is None:
            return mean_interval(self.rows, seed=seed)
        return sums_interval(self.sums, self.figure, seed=seed)


def needs_text(name: str) -> bool:
    """Return whether a metric needs answers as text; exact match needs one forward pass a row."""
    return name != "exact_match"


def check_metrics(
    names: Sequence[str], *, allow_code: bool, where: str = "evaluation.metrics"
) -> None:
    """Refuse what cannot be computed here, before any work.

    Args:
        names: of metrics.
        allow_code: whether code that a model writes may be run.
        where: they are asked for, for messages.

    Raises:
        EsftError: a library is not installed (says how to), a metric is unknown, or code may not
            be run.
    """
    from esft.errors import nearest

    for name in names:
        if name not in METRICS:
            raise EsftError(
                f"{where}: no metric is called {name}{nearest(name, METRICS)}; known are "
                f"{', '.join(METRICS)}"
            )
        package, module = _LIBRARIES.get(name, ("", "math"))
        if find_spec(module) is None:
            raise EsftError(f"{where}: {name} needs {package}: pip install {package}")
        if name == "pass_at_1" and not allow_code:
            raise EsftError(
                f"{where}: pass_at_1 runs code that the model writes, in a sandbox that "
                f"docs/eval.md describes; allow it with evaluation.allow_code: true (--allow-code)"
            )


def check_rows(name: str, rows: Sequence[tuple[Row, str]]) -> None:
    """Refuse rows, each with its reference, that a metric cannot score.

    Raises:
        DataError: names the row.
    """
    check = getattr(_module(name), "check", None) if needs_text(name) else None
    for row, reference in rows:
        if check is not None:
            check(row, reference)


def score_answers(name: str, answers: Sequence[Answer], **options: Any) -> Scores:
    """Score answers by a metric that needs them as text.

    Args:
        name: of the metric; there is a module of that name beside this one.
        answers: at least one.
        options: of `esft.measures.pass_at_1.score`; others take none.
    """
    score: Callable[..., Scores] = _module(name).score
    return score(answers, **options) if name == "pass_at_1" else score(answers)


def _module(name: str) -> Any:
    return importlib.import_module(f"esft.measures.{name}")

"""How a run is scored: while it trains, and once it has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.evaluation import Evaluation, RowScore, score_rows
from esft.files import write_text
from esft.measures.general import domain_losses, mean
from esft.measures.interval import Interval, mean_interval
from esft.progress import SILENT, Reporter
from esft.recipe_sections import EvaluationSpec
from esft.run.task_data import TaskData


@dataclass(frozen=True)
class TestScores:
    """What the trained model scores on `data.test`.

    Attributes:
        scores: by metric, with 95 % confidence intervals.
        loss: mean over the answer tokens, in nats.
        rows: how many were scored.
        tokens: how many answer tokens they have.
        answers: what is to be told of each row, JSON-ready.
    """

    scores: dict[str, Interval]
    loss: float
    rows: int
    tokens: int
    answers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, without the answers."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {"scores": scores, "loss": self.loss, "rows": self.rows, "tokens": self.tokens}

    def write(self, path: Path) -> None:
        """Write the answers, a line a row."""
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers]
        write_text(path, "".join(lines))


class Scorer:
    """Scores a model on a run's rows.

    Args:
        spec: the recipe's `evaluation` section.
        data: the run's.
    """

    def __init__(self, spec: EvaluationSpec, data: TaskData) -> None:
        self._spec, self._data = spec, data

    def evaluation(self, model: Any, reporter: Reporter = SILENT) -> Evaluation | None:
        """Score `data.eval` by what one forward pass a row tells; None if there are no rows."""
        examples = self._data.eval.examples
        return Evaluation.of(score_rows(model, examples, reporter=reporter)) if examples else None

    def general(self, model: Any, reporter: Reporter = SILENT) -> dict[str, float] | None:
        """Return each other domain's loss, in nats a token; None if the recipe names none."""
        return domain_losses(model, self._data.general, reporter=reporter) or None

    def while_training(self, model: Any) -> dict[str, float]:
        """Score `data.eval` and the other domains, by the names that `metrics.jsonl` has."""
        rows = score_rows(model, self._data.eval.examples)
        found = Evaluation.of(rows)
        metrics = {
            "eval_loss": found.loss,
            "eval_exact_match": found.exact_match,
            "eval_perplexity": found.perplexity,
        }
        for name, values in self._by_metric(rows).items():
            metrics[f"eval_{name}"] = sum(values) / len(values)
        if self._data.general:
            losses = domain_losses(model, self._data.general)
            metrics["eval_general_loss"] = mean(losses)
            metrics |= {f"eval_general_{name}_loss": loss for name, loss in losses.items()}
        return metrics

    def test(self, model: Any, reporter: Reporter = SILENT) -> TestScores | None:
        """Score `data.test`; None if the recipe names no such set."""
        if not self._data.test.examples:
            return None
        rows = score_rows(model, self._data.test.examples, reporter=reporter)
        found, by_metric = Evaluation.of(rows), self._by_metric(rows)
        return TestScores(
            scores={name: mean_interval(values) for name, values in by_metric.items()},
            loss=found.loss,
            rows=found.rows,
            tokens=found.tokens,
            answers=_answers(rows, by_metric),
        )

    def _by_metric(self, rows: Sequence[RowScore]) -> dict[str, list[float]]:
        """Return each metric's score of every row."""
        return {name: [float(row.matched) for row in rows] for name in self._spec.metrics}


def _answers(
    rows: Sequence[RowScore], by_metric: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    return [
        {
            "where": row.where,
            "matched": row.matched,
            "loss": row.loss,
            "tokens": row.tokens,
            "scores": {name: values[number] for name, values in by_metric.items()},
        }
        for number, row in enumerate(rows)
    ]

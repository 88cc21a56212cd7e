"""How a run is scored: while it trains, and once it has."""

from __future__ import annotations

from typing import Any

from esft.evaluation import Evaluation, score_rows
from esft.measures.general import domain_losses, mean
from esft.measures.task import Task, TaskScores
from esft.progress import SILENT, Reporter
from esft.recipe_sections import EvaluationSpec
from esft.run.task_data import ScoredSet, TaskData


class Scorer:
    """Scores a model on a run's rows.

    Args:
        spec: the recipe's `evaluation` section.
        data: the run's.

    Raises:
        EsftError: a metric needs a library that is not installed, or code may not be run.
        DataError: a metric cannot score a row.
    """

    def __init__(self, spec: EvaluationSpec, data: TaskData) -> None:
        self._spec, self._data = spec, data
        self._eval, self._test = self._task(data.eval), self._task(data.test)

    def evaluation(self, model: Any, reporter: Reporter = SILENT) -> Evaluation | None:
        """Score `data.eval` by what one forward pass a row tells; None if there are no rows."""
        examples = self._data.eval.examples
        return Evaluation.of(score_rows(model, examples, reporter=reporter)) if examples else None

    def general(self, model: Any, reporter: Reporter = SILENT) -> dict[str, float] | None:
        """Return each other domain's loss, in nats a token; None if the recipe names none."""
        return domain_losses(model, self._data.general, reporter=reporter) or None

    def while_training(self, model: Any) -> dict[str, float]:
        """Score `data.eval` and the other domains, by the names that `metrics.jsonl` has."""
        assert self._eval is not None  # a recipe that evaluates names rows for it
        found, scores = self._eval.means(model)
        metrics = {
            "eval_loss": found.loss,
            "eval_exact_match": found.exact_match,
            "eval_perplexity": found.perplexity,
            **{f"eval_{name}": score for name, score in scores.items()},
        }
        if losses := self.general(model):
            metrics["eval_general_loss"] = mean(losses)
            metrics |= {f"eval_general_{name}_loss": loss for name, loss in losses.items()}
        return metrics

    def test(self, model: Any, reporter: Reporter = SILENT) -> TaskScores | None:
        """Score `data.test` by all metrics; None if the recipe names no such set."""
        return None if self._test is None else self._test.score(model, reporter=reporter)

    def _task(self, scored: ScoredSet) -> Task | None:
        if not scored.examples:
            return None
        return Task(
            scored.rows,
            scored.examples,
            self._data.tokenizer,
            metrics=self._spec.metrics,
            max_new_tokens=self._spec.max_new_tokens,
            allow_code=self._spec.allow_code,
            code_seconds=self._spec.code_seconds,
        )

"""How good a model's answers to a task set are, by every metric asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.data.example import Example
from esft.data.row import Row
from esft.evaluation import Evaluation, RowScore, score_rows
from esft.files import write_text
from esft.measures import exact_match
from esft.measures.answering import Question, answer, questions
from esft.measures.interval import Interval
from esft.measures.metric import (
    Answer,
    Scores,
    check_metrics,
    check_rows,
    needs_text,
    score_answers,
)
from esft.progress import SILENT, Reporter


@dataclass(frozen=True)
class TaskScores(Evaluation):
    """An `Evaluation`, and the metrics asked for.

    Attributes:
        scores: by metric, with 95 % confidence intervals; the first is the task's score.
        answers: what there is to tell of each row, JSON-ready: `where`, `matched` (exactly), `loss`
            (the sum over its answer tokens), `tokens`, `answer` if it was asked for as text, and
            `scores` by metric.
    """

    scores: dict[str, Interval]
    answers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, without the answers."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
        about = Evaluation(self.rows, self.tokens, self.matched, self.loss)
        return about.to_dict() | {"scores": scores}

    def write_answers(self, path: Path) -> None:
        """Write the answers, one JSON object a line."""
        lines = [json.dumps(found, ensure_ascii=False) + "\n" for found in self.answers]
        write_text(path, "".join(lines))


class Task:
    """A task set that models are scored on.

    What can be wrong with it is found when it is made, before any model is asked.

    Args:
        rows: at least one.
        examples: the same in tokens.
        tokenizer: that they were made by.
        metrics: by name; the first is the task's score.
        max_new_tokens: of an answer at most, where one is needed as text.
        allow_code: whether code that a model writes may be run, in a sandbox.
        code_seconds: that one answer's code, and its tests, may take.

    Raises:
        EsftError: a metric needs a library that is not installed, or code may not be run.
        DataError: a metric cannot score a row.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        metrics: Sequence[str] = ("exact_match",),
        max_new_tokens: int = 64,
        allow_code: bool = False,
        code_seconds: float = 10.0,
    ) -> None:
        check_metrics(metrics, allow_code=allow_code)
        self._examples, self._tokenizer, self._metrics = examples, tokenizer, metrics
        self._max_new_tokens, self._code_seconds = max_new_tokens, code_seconds
        self._questions: list[Question] = []
        if any(map(needs_text, metrics)):
            self._questions = questions(rows, examples, tokenizer)
        for name in metrics:
            check_rows(name, [(asked.row, asked.reference) for asked in self._questions])

    def means(self, model: Any) -> tuple[Evaluation, dict[str, float]]:
        """Return what one forward pass a row tells of a model, and the figure of each metric.

        Raises:
            ModelError: the model's logits are not finite.
        """
        rows, answers = self._asked(model, 4096, SILENT)
        scores = self._scores(rows, answers, SILENT)
        return Evaluation.of(rows), {name: found.value for name, found in scores.items()}

    def score(
        self, model: Any, *, batch_tokens: int = 4096, reporter: Reporter = SILENT
    ) -> TaskScores:
        """Score a model by all metrics, with intervals and every row's own scores.

        Args:
            model: a transformers causal language model; its mode is restored.
            batch_tokens: tokens at a time, padding and answers included.
            reporter: shows progress.

        Raises:
            ModelError: the model's logits are not finite.
        """
        rows, answers = self._asked(model, batch_tokens, reporter)
        scores = self._scores(rows, answers, reporter)
        return TaskScores(
            **asdict(Evaluation.of(rows)),
            scores={name: found.interval() for name, found in scores.items()},
            answers=[
                {
                    **asdict(row),
                    **({"answer": answers[number].text} if answers else {}),
                    "scores": {name: found.rows[number] for name, found in scores.items()},
                }
                for number, row in enumerate(rows)
            ],
        )

    def _asked(
        self, model: Any, batch_tokens: int, reporter: Reporter
    ) -> tuple[list[RowScore], list[Answer]]:
        rows = score_rows(model, self._examples, batch_tokens=batch_tokens, reporter=reporter)
        if not self._questions:
            return rows, []
        answers = answer(
            model,
            self._tokenizer,
            self._questions,
            max_new_tokens=self._max_new_tokens,
            batch_tokens=batch_tokens,
            reporter=reporter,
        )
        return rows, answers

    def _scores(
        self, rows: list[RowScore], answers: list[Answer], reporter: Reporter
    ) -> dict[str, Scores]:
        options = {"seconds": self._code_seconds, "reporter": reporter}
        return {
            name: score_answers(name, answers, **options)
            if needs_text(name)
            else exact_match.score(rows)
            for name in self._metrics
        }

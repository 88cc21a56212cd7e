"""A run's folder as a report reads it: of a run that ended, was killed, or goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.comparison.records import Comparison, Outcome, Point, RunRecord
from esft.errors import DataError
from esft.files import read_json
from esft.recipe_text import read_mapping
from esft.run.folder import METRICS, RECIPE, RESULT, SCORES, SELECTION
from esft.scores import Scores
from esft.selection import Selection

_GENERAL, _LOSS = "eval_general_", "_loss"
_NO_SCORES = ("eval_loss", "eval_perplexity", "eval_general_loss")


# Of runs that end nowhere else: a comparison counts only those that have an outcome, and pictures
# of one run are worth having while it goes on. Of the outcome they show nothing.
_ENDED = Outcome(
    scores={},
    loss=0.0,
    general={},
    trained=0,
    total=1,
    delta_bytes=0,
    steps=0,
    seconds=0.0,
    step_seconds=0.0,
    tokens_per_second=0.0,
    peak_memory=0,
    flops=None,
)


@dataclass(frozen=True)
class RunFolder:
    """What is there of a run.

    Attributes:
        path: of the folder.
        recipe: every key of it, defaults filled in when it was trained.
        log: what was logged, by ascending step: losses while training, and evaluations.
        result: `esft.run.result.RunResult.to_dict`; None if the run has not ended.
        scores: that experts were selected by, if this run took them.
        selection: the experts that train; None if none were selected.
    """

    path: Path
    recipe: Mapping[str, Any]
    log: list[dict[str, Any]]
    result: Mapping[str, Any] | None
    scores: Scores | None
    selection: Selection | None

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read the folder.

        Raises:
            EsftError: a file in it is damaged; the message names it.
        """
        recipe, _ = read_mapping(path / RECIPE)
        scores, selection, result = path / SCORES, path / SELECTION, path / RESULT
        found = read_json(result, "result of a run", DataError) if result.is_file() else None
        if found is not None and not isinstance(found, dict):
            raise DataError(f"{result}: not the result of a run")
        return cls(
            path=path,
            recipe=recipe,
            log=_read_log(path / METRICS),
            result=found,
            scores=Scores.read(scores) if scores.is_file() else None,
            selection=Selection.read(selection) if selection.is_file() else None,
        )

    def as_comparison(self, task: str) -> Comparison:
        """Return the run as a comparison of one method with one seed, for its pictures.

        Args:
            task: what the data is called.
        """
        points = self.points
        metrics = (self.recipe.get("evaluation") or {}).get("metrics") or ["exact_match"]
        method = str(self.recipe.get("method", "esft"))
        training = self.recipe.get("training") or {}
        record = RunRecord(
            task=task,
            method=method,
            learning_rate=training.get("learning_rate", 0.0),
            seed=0,
            folder=".",
            chosen=True,
            points=points,
            outcome=_ENDED,
        )
        return Comparison(
            model=str(self.recipe.get("model")),
            tasks=[task],
            methods=[method],
            seeds=[0],
            metric=metrics[0],
            base={task: points[0]} if points and points[0].step == 0 else {},
            records=[record],
            recipe=dict(self.recipe),
            versions={},
        )

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Steps, and the mean training loss since the one before."""
        return [(line["step"], line["loss"]) for line in self.log if "loss" in line]

    @property
    def points(self) -> list[Point]:
        """The evaluations."""
        return [_point(line) for line in self.log if "eval_loss" in line]


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines by step; a run that was resumed may have done a step twice."""
    if not path.is_file():
        return []
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    written = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(written, start=1):
        if not text or number == len(written):  # the last is empty, or not written to its end
            continue
        try:
            line = json.loads(text)
            lines[line["step"], "eval_loss" in line] = line
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a line of a run's log") from None
    return [lines[key] for key in sorted(lines)]


def _point(line: Mapping[str, Any]) -> Point:
    general = {
        key.removeprefix(_GENERAL).removesuffix(_LOSS): value
        for key, value in line.items()
        if key.startswith(_GENERAL) and key.endswith(_LOSS) and key != "eval_general_loss"
    }
    scores = {
        key.removeprefix("eval_"): value
        for key, value in line.items()
        if key.startswith("eval_") and key not in _NO_SCORES and not key.startswith(_GENERAL)
    }
    return Point(
        step=line["step"],
        seconds=line.get("train_seconds", line.get("seconds", 0.0)),
        scores=scores,
        loss=line["eval_loss"],
        general=general,
    )

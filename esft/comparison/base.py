"""The untrained model's scores: what every method starts from."""

from __future__ import annotations

from typing import Any

from esft.comparison.records import Point
from esft.inference import load
from esft.progress import SILENT, Reporter
from esft.recipe_sections import Recipe
from esft.run.scoring import Scorer
from esft.run.task_data import prepare


def score_base(recipe: Recipe, *, reporter: Reporter = SILENT) -> Point:
    """Score a recipe's model as it is on `data.test` and on the other domains.

    Args:
        recipe: of any run of the task; names a test set.
        reporter: shown the progress.

    Raises:
        DataError, ModelError: the input is at fault.
    """
    model, tokenizer = load(recipe.model, device=recipe.device, dtype=recipe.dtype)
    data = prepare(recipe.data, tokenizer, evaluation=recipe.evaluation, reporter=reporter)
    scorer = Scorer(recipe.evaluation, data)
    test: Any = scorer.test(model, reporter)
    return Point(
        step=0,
        seconds=0.0,
        scores={name: score.value for name, score in test.scores.items()},
        loss=test.loss,
        general=scorer.general(model, reporter) or {},
    )

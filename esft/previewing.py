"""A recipe's data before it is trained on: some rows as the model will see them, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.data.preview import ShownRow, show_rows
from esft.data.sources import SourceRows
from esft.data.statistics import SetStatistics, measure
from esft.loading import load_tokenizer
from esft.locating import resolve
from esft.progress import SILENT, Reporter
from esft.recipe import as_recipe
from esft.recipe_sections import Recipe
from esft.run.task_data import prepare


@dataclass(frozen=True)
class Preview:
    """What training would start from.

    Attributes:
        recipe: whose data it is.
        sources: where the training rows came from.
        eval_sources: where the test rows came from.
        skipped: rows that cannot be used, see `BadRows`.
        rows: some rows of the train set.
        statistics: of the whole; None if it was not asked for.
    """

    recipe: Recipe
    sources: list[SourceRows]
    eval_sources: list[SourceRows]
    skipped: list[dict[str, str]]
    rows: list[ShownRow]
    statistics: SetStatistics | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "model": self.recipe.model,
            "data": self.recipe.data.model_dump(exclude_none=True),
            "sources": {
                "train": [_source(read) for read in self.sources],
                "eval": [_source(read) for read in self.eval_sources],
            },
            "skipped": self.skipped,
            "rows": [row.to_dict() for row in self.rows],
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
        }


def preview_data(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    rows: int = 3,
    seed: int | None = None,
    statistics: bool = False,
    reporter: Reporter = SILENT,
) -> Preview:
    """Prepare a recipe's data as `esft.train` does, and return what there is to see of it.

    Of the model only the configuration and the tokenizer are read.

    Args:
        recipe: a recipe, its keys as a mapping, or the path of a YAML file.
        rows: how many to return.
        seed: draw them by chance; None takes the first ones.
        statistics: whether to count and measure the whole.
        reporter: told what `esft.train` would be told of the data.

    Raises:
        RecipeError, DataError, ModelError: as for `esft.train`.
    """
    recipe = as_recipe(recipe)
    tokenizer = load_tokenizer(resolve(recipe.model, weights=False))
    data = prepare(recipe.data, tokenizer, reporter=reporter)
    figures = None
    if statistics:
        figures = measure(
            data.examples, data.fitted, data.train_set, recipe.data.max_length, data.eval.examples
        )
    return Preview(
        recipe=recipe,
        sources=data.sources,
        eval_sources=data.eval_sources,
        skipped=data.bad_rows.skipped,
        rows=show_rows(data.train_set, tokenizer, rows, seed=seed),
        statistics=figures,
    )


def _source(read: SourceRows) -> dict[str, Any]:
    return {"path": read.source.path, "format": read.format, "rows": len(read.rows)}

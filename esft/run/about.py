"""What a delta's manifest says of the run that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft.evaluation import Evaluation
from esft.moe import Anatomy
from esft.recipe_sections import Recipe
from esft.run.trainer import Trained
from esft.scores import Scores
from esft.selection import Selection


def about_run(
    recipe: Recipe,
    anatomy: Anatomy,
    tokenizer: str | None,
    selection: Selection | None,
    scores: Path,
    outcome: Trained,
    evaluation: Evaluation | None,
    *,
    adapter: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Describe a run, JSON-ready, for `esft.manifest.write_manifest`.

    Args:
        recipe: with every default filled in.
        anatomy: of the base.
        tokenizer: digest of the base's tokenizer.
        selection: the experts that trained, if any were selected.
        scores: file of the scores that this run selected them by; it need not exist.
        outcome: what training came to.
        evaluation: of the trained model, if there are test rows.
        adapter: rank and sizes, where low-rank factors trained; see `Method.adapter`.
    """
    about: dict[str, Any] = {
        "method": recipe.method,
        "base": {
            "name": recipe.model,
            "model_type": anatomy.model_type,
            "architecture": anatomy.architecture,
            "tokenizer": tokenizer,
        },
        "recipe": recipe.model_dump(exclude_none=True),
        "training": {
            "steps": outcome.steps,
            "best_step": outcome.best,
            "evaluation": None if evaluation is None else evaluation.to_dict(),
        },
    }
    if kinds := recipe.frozen.kinds:
        about["training"]["frozen_dtype"] = kinds
    if adapter is not None:
        about["adapter"] = dict(adapter)
    if selection is not None:
        about["selection"] = selection.to_dict()
    if recipe.selects_experts:
        about["scores"] = _scores_origin(recipe, scores)
    return about


def _scores_origin(recipe: Recipe, scores: Path) -> dict[str, Any]:
    """Return where the selection's scores came from: this run's data, or another's file."""
    if isinstance(recipe.selection, str):
        return {"selection_file": recipe.selection}
    # Nothing may fail now that training is done, not even where somebody tidied up.
    sample = Scores.read(scores).sample if scores.is_file() else {}
    data = [source.path for source in recipe.data.sources("train")]
    return {"data": data[0] if len(data) == 1 else data, "sample": sample}

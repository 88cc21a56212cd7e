"""What must be the same when a run is resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esft.fingerprint import Fingerprint
from esft.recipe_sections import Recipe
from esft.task_data import data_identity

if TYPE_CHECKING:
    from esft.selection import Selection

# Where files lie may change; what is in them may not.
_ELSEWHERE = {"device", "model", "data"}


def guard(recipe: Recipe, base: Fingerprint, selection: Selection | None) -> dict[str, Any]:
    """Describe a run by what decides its result, as nested JSON-ready mappings.

    Args:
        recipe: with every default filled in.
        base: of the checkpoint that training starts from.
        selection: the experts that train, if any are selected.
    """
    elsewhere = _ELSEWHERE | ({"selection"} if isinstance(recipe.selection, str) else set())
    return {
        "recipe": recipe.model_dump(exclude=elsewhere),
        "base": base,
        "data": data_identity(recipe.data),
        "selection": None if selection is None else selection.to_dict()["experts"],
    }

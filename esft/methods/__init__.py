"""What is trained and what is saved: one method a file, all through the contract in `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esft.methods.base import Method
from esft.methods.expert import ExpertMethod
from esft.methods.full import FullMethod
from esft.methods.lora import LoraMethod
from esft.recipe_sections import LoraSpec, Recipe

if TYPE_CHECKING:
    from esft.selection import Selection

__all__ = ["ExpertMethod", "FullMethod", "LoraMethod", "Method", "make_method"]


def make_method(recipe: Recipe, selection: Selection | None) -> Method:
    """Return the method that a recipe asks for; `selection` is needed where experts train."""
    if recipe.method == "lora":
        return LoraMethod(recipe.lora or LoraSpec())
    if recipe.method == "full":
        return FullMethod()
    assert selection is not None
    return ExpertMethod(selection, name=recipe.method, param_dtype=recipe.param_dtype)

"""What is trained and what is saved: one method a file, all through the contract in `base`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esft.methods.base import Method
from esft.methods.expert import ExpertMethod
from esft.methods.full import FullMethod
from esft.methods.hot_lora import HotLoraMethod
from esft.methods.lora import LoraMethod
from esft.progress import SILENT, Reporter
from esft.recipe_sections import LoraSpec, Recipe

if TYPE_CHECKING:
    from esft.selection import Selection

__all__ = ["ExpertMethod", "FullMethod", "HotLoraMethod", "LoraMethod", "Method", "make_method"]


def make_method(
    recipe: Recipe,
    selection: Selection | None,
    reporter: Reporter = SILENT,
    *,
    match_bytes: int | None = None,
) -> Method:
    """Return the method that a recipe asks for.

    Args:
        recipe: of the run.
        selection: the experts that train; None where the recipe trains none.
        reporter: for the method's warnings.
        match_bytes: of the delta whose size LoRA's adapter is to have, where the recipe says so.
    """
    if recipe.method == "lora":
        spec = recipe.lora or LoraSpec()
        return LoraMethod(spec, match_bytes=match_bytes, reporter=reporter)
    if recipe.method == "full":
        return FullMethod()
    if recipe.method == "hot-lora":
        assert selection is not None  # the recipe selects experts
        spec = recipe.lora or LoraSpec()
        return HotLoraMethod(selection, spec, param_dtype=recipe.param_dtype)
    return ExpertMethod(
        selection,
        recipe.train,
        name=recipe.method,
        param_dtype=recipe.param_dtype,
        reporter=reporter,
    )

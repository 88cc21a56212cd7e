"""Options of the commands that take a recipe, or a model and its data instead of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from esft.recipe_sections import Recipe
    from esft.recipe_text import Override

RecipeOrModel = Annotated[
    str,
    typer.Argument(metavar="RECIPE|MODEL", help="A recipe (.yaml), or a model with --data."),
]
Data = Annotated[
    str | None, typer.Option(help="Training rows, without a recipe.", metavar="FILE|DIR|ID")
]
Eval = Annotated[
    str | None,
    typer.Option("--eval", help="Rows to score while training (data.eval).", metavar="FILE|DIR|ID"),
]
Test = Annotated[
    str | None,
    typer.Option("--test", help="Rows to score once trained (data.test).", metavar="FILE|DIR|ID"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe's key; repeatable.", metavar="KEY=VALUE"),
]


def resolved(recipe: str, data: str | None, overrides: list[str | Override]) -> Recipe:
    """Return the recipe that the options come to."""
    from esft.recipe import read_recipe, recipe_from_options

    if data is None:
        return read_recipe(recipe, overrides)
    return recipe_from_options(recipe, data, overrides)

"""`esft recipes` and `esft init`: the recipes that ship, and a copy of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def recipes(json: output.Json = False) -> None:
    """List the recipes that ship: what each trains, and how. Next: esft init NAME."""
    from esft import list_recipes

    found = list_recipes()
    if json:
        output.print_json({"recipes": [recipe.to_dict() for recipe in found]})
        return
    table = output.table("recipes that ship", "name", "model", "method", "")
    for recipe in found:
        table.add_row(recipe.name, recipe.model, recipe.method, recipe.summary)
    output.console().print(table)


def init(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One of esft recipes.", show_default=True)
    ] = "esft-token",
    out: Annotated[
        Path, typer.Option(help="The new file; never an existing one.", metavar="FILE")
    ] = Path("recipe.yaml"),
    json: output.Json = False,
) -> None:
    """Copy a recipe that ships, to start from. Next: esft train, as its first lines say."""
    from esft.shipped import find_recipe, init_recipe

    recipe = find_recipe(name)
    written = init_recipe(name, out)
    command = f"esft {recipe.command} {written} --out runs/{recipe.name}"
    if json:
        output.print_json({"out": str(written), "recipe": recipe.to_dict(), "next": command})
        return
    print(f"{written}: {recipe.summary}\n\nnext: {command}")

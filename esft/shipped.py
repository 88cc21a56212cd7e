"""The recipes that ship: which there are, and a copy of one to start from.

They lie in `recipes/` of the repository, and beside this file once the package is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.errors import RecipeError, nearest
from esft.files import refuse_existing, write_text
from esft.recipe_text import read_mapping

DEFAULT = "esft-token"
OUT = "recipe.yaml"
COMPARISON = "compare"  # the section, and so the command, of a recipe for several methods

_INSTALLED = Path(__file__).parent / "recipes"
_IN_REPOSITORY = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class ShippedRecipe:
    """One of the recipes that ship.

    Attributes:
        name: `esft init` takes it.
        summary: the first line of its head.
        model: what it trains.
        method: what it trains it by; `compare` where it compares several.
        file: where it lies.
    """

    name: str
    summary: str
    model: str
    method: str
    file: Path

    @property
    def command(self) -> str:
        """The verb that takes it: `train`, or `compare`."""
        return COMPARISON if self.method == COMPARISON else "train"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"file": str(self.file), "command": self.command}


def list_recipes() -> list[ShippedRecipe]:
    """Return the recipes that ship: those that run anywhere first, then by name."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _IN_REPOSITORY
    found = [_described(file) for file in sorted(folder.glob("*.yaml"))]
    return sorted(found, key=lambda recipe: recipe.model != "tiny-moe")


def find_recipe(name: str) -> ShippedRecipe:
    """Return the recipe of a name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    known = {recipe.name: recipe for recipe in list_recipes()}
    if name not in known:
        close = nearest(name, known) or f"; there are {', '.join(known)}"
        raise RecipeError(f"{name}: no such recipe ships{close}")
    return known[name]


def init_recipe(name: str = DEFAULT, out: str | Path = OUT) -> Path:
    """Copy a recipe that ships, to start from.

    Args:
        name: of the recipe, see `list_recipes`.
        out: the new file.

    Returns:
        `out`.

    Raises:
        RecipeError: no recipe has this name.
        OutputError: `out` exists, or cannot be written.
    """
    out = Path(out)
    recipe = find_recipe(name)
    refuse_existing(out)
    write_text(out, recipe.file.read_text(encoding="utf-8"))
    return out


def _described(file: Path) -> ShippedRecipe:
    keys: Mapping[str, Any] = read_mapping(file)[0]
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return ShippedRecipe(
        name=file.stem,
        summary=first.removeprefix("#").strip(),
        model=str(keys["model"]),
        method=COMPARISON if COMPARISON in keys else str(keys.get("method", "esft")),
        file=file,
    )

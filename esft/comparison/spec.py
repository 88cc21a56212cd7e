"""What a comparison compares: a recipe's `compare` section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esft.comparison.sweep import check_sweep, parse_sweep
from esft.errors import RecipeError, nearest
from esft.recipe import make_paths_absolute, overridden
from esft.recipe_text import Override, Places, parse_override, read_mapping

SECTION = "compare"
DEFAULT_METHODS = ["esft-token", "esft-gate", "random", "lora", "hot-lora", "full"]

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CompareSpec(BaseModel):
    """The `compare` section; see docs/compare.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    methods: list[str] | dict[str, dict[str, Any] | None] = Field(
        default_factory=lambda: list(DEFAULT_METHODS)
    )
    learning_rates: list[_Rate] = Field(default_factory=list)
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2])
    sweep: dict[str, list[int | float]] = Field(default_factory=dict)
    keep_deltas: Literal["all", "chosen", "none"] = "chosen"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return each method's own keys by its name, in order."""
        if isinstance(self.methods, dict):
            return {name: keys or {} for name, keys in self.methods.items()}
        return {name: {} for name in self.methods}


@dataclass(frozen=True)
class CompareRecipe:
    """A recipe with a `compare` section, read but not yet turned into runs.

    Attributes:
        base: the recipe's other keys, nested, overrides applied, paths absolute.
        spec: the section.
        places: finds the line of a key for messages.
    """

    base: dict[str, Any]
    spec: CompareSpec
    places: Places

    def to_dict(self) -> dict[str, Any]:
        """Return the whole as one recipe's keys; `as_compare_recipe` reads it back."""
        return self.base | {SECTION: self.spec.model_dump()}


def as_compare_recipe(
    recipe: Mapping[str, Any] | str | Path,
    overrides: Iterable[str | Override] = (),
) -> CompareRecipe:
    """Read a recipe for a comparison; without a `compare` section it gets one of defaults.

    Args:
        recipe: the path of a YAML file, or its keys as a mapping.
        overrides: as for `esft.recipe.read_recipe`; `compare.seeds=[0]` reaches the section.

    Raises:
        RecipeError: the file cannot be read, or the section has an unknown key or a wrong value.
            The other keys are checked with each method's own, by `esft.comparison.runs`.
    """
    if isinstance(recipe, Mapping):
        value, places, folder = dict(recipe), Places(), None
    else:
        value, places = read_mapping(Path(recipe))
        folder = Path(recipe).parent
    given = [parse_override(item) if isinstance(item, str) else item for item in overrides]
    changed = overridden(value, given, places=places, folder=folder)
    section = changed.pop(SECTION, None)
    make_paths_absolute(changed, Path.cwd())
    try:
        spec = CompareSpec.model_validate({} if section is None else section)
    except ValidationError as error:
        raise RecipeError(_explain(error, places)) from None
    _check(spec, places)
    for task in spec.tasks.values():
        for place in ([] if folder is None else [folder]) + [Path.cwd()]:
            section = {"data": task}
            make_paths_absolute(section, place)
            task.update(section["data"])
    return CompareRecipe(changed, spec, places)


def given_options(
    methods: str | None, seeds: str | None, learning_rates: str | None, sweeps: Iterable[str]
) -> list[Override]:
    """Return the overrides that the options of `esft compare` stand for.

    Args:
        methods: names with commas between; `seeds` and `learning_rates` likewise.
        sweeps: each as `p=0.1,0.2`.

    Raises:
        RecipeError: one cannot be read.
    """
    found = []
    for option, text, read in (
        ("methods", methods, str.strip),
        ("seeds", seeds, int),
        ("learning_rates", learning_rates, float),
    ):
        if text is not None:
            try:
                values = [read(item) for item in text.split(",")]
            except ValueError:
                raise RecipeError(
                    f"--{option.replace('_', '-')} {text}: expected numbers with commas between"
                ) from None
            found.append(Override(f"--{option.replace('_', '-')}", (SECTION, option), values))
    for text in sweeps:
        key, swept = parse_sweep(text)
        found.append(Override(f"--sweep {key}", (SECTION, "sweep", key), swept))
    return found


def _check(spec: CompareSpec, places: Places) -> None:
    for key in ("seeds", "learning_rates"):
        values = getattr(spec, key)
        if len(set(values)) != len(values):
            raise RecipeError(f"{places.of((SECTION, key))}: a value is given twice ({values})")
    names = spec.methods if isinstance(spec.methods, list) else list(spec.methods)
    if not names:
        raise RecipeError(f"{places.of((SECTION, 'methods'))}: names no method")
    for name in [*names, *spec.tasks]:
        # Each is the name of a folder.
        if not name or name.strip(".") != name or set(name) & set('/\\:*?"<>|\0') or "\n" in name:
            raise RecipeError(f"{places.of((SECTION,))}: {name!r} cannot be the name of a folder")
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{places.of((SECTION, 'methods'))}: {name} is given twice")
    for key, values in spec.sweep.items():
        check_sweep(key, values, places.of((SECTION, "sweep", key)))


def _explain(error: ValidationError, places: Places) -> str:
    first = error.errors()[0]
    key = tuple(str(part) for part in first["loc"] if "[" not in str(part))
    place = places.of((SECTION, *key))
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(key[-1], list(CompareSpec.model_fields))}"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"

"""A recipe: one YAML file that states a whole run.

Keys are checked by name: an unknown one is an error that suggests the nearest. `training` takes
the fields of `transformers.TrainingArguments`. Relative paths are relative to the recipe.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from esft.data.sources import is_local
from esft.errors import RecipeError, nearest
from esft.locating import TINY_MOE, locate_shipped
from esft.recipe_checks import check_together
from esft.recipe_sections import (
    CheckpointSpec,
    DataSpec,
    EarlyStoppingSpec,
    EvaluationSpec,
    FrozenSpec,
    LoraSpec,
    LossSpec,
    Recipe,
    SelectionSpec,
    SourceSpec,
    TrainSpec,
)
from esft.recipe_text import Key, Override, Places, parse_override, read_mapping
from esft.run.fields import check_best, check_training
from esft.secrets import has_secret


def read_recipe(path: str | Path, overrides: Iterable[str | Override] = ()) -> Recipe:
    """Read a recipe and apply overrides, such as `training.learning_rate=1e-3`.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown or its value is wrong; the
            message has the file and line, or the override.
    """
    path = Path(path)
    value, places = read_mapping(path)
    return make_recipe(value, overrides, places=places, folder=path.parent)


def make_recipe(
    value: Mapping[str, Any],
    overrides: Iterable[str | Override] = (),
    *,
    places: Places | None = None,
    folder: Path | None = None,
) -> Recipe:
    """Check a recipe given as nested mappings, with overrides applied.

    Args:
        value: as read from YAML.
        overrides: `key=value` with dots between nested keys and the value in YAML, or parsed.
        places: finds the line of a key for messages.
        folder: what relative paths in `value` are relative to; those in overrides are relative
            to the working directory.

    Raises:
        RecipeError: see `read_recipe`.
    """
    places = places or Places()
    changed = overridden(value, overrides, places=places, folder=folder)
    make_paths_absolute(changed, Path.cwd())
    if "compare" in changed:
        raise RecipeError(
            f"{places.of(('compare',))}: this recipe is for several methods; esft compare takes it"
        )
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        raise RecipeError(_explain(error, places)) from None
    check_together(recipe, places)
    training = check_training(recipe.training, places)
    check_best(
        training,
        places,
        evaluation=recipe.evaluation,
        early_stopping=recipe.early_stopping is not None,
    )
    return recipe.model_copy(update={"training": training})


def overridden(
    value: Mapping[str, Any],
    overrides: Iterable[str | Override],
    *,
    places: Places,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Return a copy of a recipe's keys with overrides applied; arguments as for `make_recipe`.

    Raises:
        RecipeError: an override is wrong, or a value is none that JSON has.
    """
    changed = _plain(value, (), places)
    if folder is not None:
        make_paths_absolute(changed, folder)
    for item in overrides:
        override = parse_override(item) if isinstance(item, str) else item
        places.overridden(override)
        _apply(changed, override, places)
    return changed


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Return a recipe given as such, as its keys in a mapping, or as the path of a YAML file.

    Raises:
        RecipeError: see `read_recipe`.
    """
    if isinstance(recipe, str | Path):
        return read_recipe(recipe)
    return recipe if isinstance(recipe, Recipe) else make_recipe(recipe)


def recipe_from_options(model: str, train: str, overrides: Iterable[str | Override] = ()) -> Recipe:
    """Make a recipe from a model, training rows and overrides.

    Raises:
        RecipeError: `model` is a recipe itself, or an override is wrong.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        raise RecipeError(f"--data: is for a model; {model} is a recipe and names its own data")
    return make_recipe({"model": model, "data": {"train": train}}, overrides)


def _plain(value: Any, key: Key, places: Places) -> Any:
    """Copy nested mappings and lists; every value in them must be one that JSON has, too."""
    if isinstance(value, Mapping):
        return {name: _plain(item, (*key, str(name)), places) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*key, str(place)), places) for place, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise RecipeError(f"{places.of(key)}: not text, a number, true or false (got {value!r})")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{places.of(key)}: must be finite (got {value})")
    if isinstance(value, str) and has_secret(value):
        # A run writes its recipe down, and what it writes is shown to others.
        raise RecipeError(
            f"{places.of(key)}: holds an access token or a password; leave it out of the recipe: "
            f"set HF_TOKEN, or run hf auth login"
        )
    return value


def _apply(value: dict[str, Any], override: Override, places: Places) -> None:
    place = value
    for depth, part in enumerate(override.key[:-1], start=1):
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(
                f"{override.source}: contradicts {'.'.join(override.key[:depth])}, which is "
                f"{inner!r}; leave one of them out"
            )
        place = inner
    place[override.key[-1]] = _plain(override.value, override.key, places)


def _explain(error: ValidationError, places: Places) -> str:
    errors = error.errors()
    # A misspelt key is unknown and missing; how it is spelt is the better news. Of a value that
    # may have one of several types, the longest path belongs to the type that fits best.
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    first = unknown[0] if unknown else max(same, key=lambda e: len(e["loc"]))
    # pydantic adds these types to the path; keys of a recipe have other names.
    types = {"str", "int", "float", "literal['auto']", "list[str]", "list[union[str,SourceSpec]]"}
    types |= {"SelectionSpec", "TrainSpec", "LoraSpec", "SourceSpec", "FrozenSpec"}
    types.add("literal['int8','nf4']")
    types.add("dict[str,union[str,SourceSpec]]")
    key = tuple(str(part) for part in first["loc"] if part not in types)
    place = places.of(key)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(key[-1], _known(key[:-1]))}"
    if first["type"] == "missing":
        return f"{places.of(key[:-1])}: the key {'.'.join(key)} is missing"
    if key == ("selection",):
        return f"{place}: expected a file, or options of esft select (got {first['input']!r})"
    if key == ("frozen_dtype",):
        return f"{place}: expected int8, nf4, or one of them a part (got {first['input']!r})"
    if first["type"] == "model_type":
        return f"{place}: expected a mapping of keys (got {first['input']!r})"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"


def _known(key: Key) -> list[str]:
    sections: dict[Key, type[BaseModel]] = {
        ("data",): DataSpec,
        ("selection",): SelectionSpec,
        ("train",): TrainSpec,
        ("evaluation",): EvaluationSpec,
        ("lora",): LoraSpec,
        ("checkpoints",): CheckpointSpec,
        ("losses",): LossSpec,
        ("frozen_dtype",): FrozenSpec,
        ("early_stopping",): EarlyStoppingSpec,
    }
    holders = (("data", "train"), ("data", "eval"), ("data", "test"), ("evaluation", "general"))
    section = SourceSpec if key[:2] in holders else Recipe
    return list(sections.get(key, section).model_fields)


def make_paths_absolute(value: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe's keys absolute, in place; they are relative to `folder`."""
    data = value.get("data")
    if isinstance(data, dict):
        for key in ("train", "eval", "test"):
            if key in data:
                data[key] = _absolute_sources(data[key], folder)
    evaluation = value.get("evaluation")
    if isinstance(evaluation, dict):
        general = evaluation.get("general")
        if isinstance(general, dict):
            sources = {name: _absolute_sources(item, folder) for name, item in general.items()}
            evaluation["general"] = sources
        elif isinstance(general, str):
            evaluation["general"] = _absolute(general, folder)
    if isinstance(value.get("selection"), str):
        value["selection"] = _absolute(value["selection"], folder)
    model = value.get("model")
    # A hub id looks like a relative path; it is one only if the folder is there.
    if isinstance(model, str) and model != TINY_MOE and (folder / model).is_dir():
        value["model"] = _absolute(model, folder)


def _absolute_sources(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute_sources(source, folder) for source in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _absolute_sources(value["path"], folder)}
    if isinstance(value, str) and is_local(value, folder):
        return _absolute(value, folder)
    return value


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(locate_shipped(path)).expanduser()).resolve())

"""A recipe: one YAML file that states a whole run.

Keys are checked by name: an unknown one is an error that suggests the nearest. `training` takes
the fields of `transformers.TrainingArguments`. Relative paths are relative to the recipe.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from esft.data.sources import is_local
from esft.errors import RecipeError, SelectionError, nearest
from esft.locating import TINY_MOE, locate_shipped
from esft.recipe_sections import (
    CheckpointSpec,
    DataSpec,
    EarlyStoppingSpec,
    EvaluationSpec,
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
from esft.selection_rule import METRICS, make_rule


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
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        raise RecipeError(_explain(error, places)) from None
    _check_together(recipe, places)
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
    types |= {"SelectionSpec", "TrainSpec", "LoraSpec", "SourceSpec"}
    types.add("dict[str,union[str,SourceSpec]]")
    key = tuple(str(part) for part in first["loc"] if part not in types)
    place = places.of(key)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(key[-1], _known(key[:-1]))}"
    if first["type"] == "missing":
        return f"{places.of(key[:-1])}: the key {'.'.join(key)} is missing"
    if key == ("selection",):
        return f"{place}: expected a file, or options of esft select (got {first['input']!r})"
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
        ("early_stopping",): EarlyStoppingSpec,
    }
    holders = (("data", "train"), ("data", "eval"), ("data", "test"), ("evaluation", "general"))
    section = SourceSpec if key[:2] in holders else Recipe
    return list(sections.get(key, section).model_fields)


def _check_together(recipe: Recipe, places: Places) -> None:
    selects = recipe.selects_experts or recipe.matches_esft
    if not recipe.trains_experts:
        if recipe.selection is not None and not selects:
            raise RecipeError(
                f"{places.of(('selection',))}: method {recipe.method} trains no selection; "
                f"leave it out, or use method: esft"
            )
        if recipe.param_dtype != "float32" and not recipe.selects_experts:
            raise RecipeError(
                f"{places.of(('param_dtype',))}: is of selected experts; with method "
                f"{recipe.method} set dtype"
            )
    if recipe.train is not None:
        _check_train(recipe, recipe.train, places)
    if recipe.lora is not None:
        _check_lora(recipe, recipe.lora, places)
    if recipe.method == "random" and isinstance(recipe.selection, str):
        raise RecipeError(
            f"{places.of(('selection',))}: method random draws its own experts, as many as a rule "
            f"would pick; give the rule (metric: {' or '.join(METRICS)}, p, ...) instead of a file"
        )
    if recipe.losses is not None:
        _check_losses(recipe.losses, places)
    if isinstance(recipe.selection, SelectionSpec):
        _check_rule(recipe, recipe.selection, places)
    if recipe.checkpoints.keep_best:
        scored = recipe.training.get("eval_strategy", "no") != "no"
        if not scored or recipe.training.get("save_strategy", "no") == "no":
            raise RecipeError(
                f"{places.of(('checkpoints', 'keep_best'))}: needs training.save_strategy and "
                f"training.eval_strategy: only checkpoints of steps that are scored can be best"
            )
    _check_data(recipe, places)
    if recipe.data.eval is None and recipe.data.eval_rows is None:
        asked = {"eval_strategy": "no", "eval_on_start": False}
        for key, silent in asked.items():
            if recipe.training.get(key, silent) != silent:
                raise RecipeError(
                    f"{places.of(('training', key))}: is set, but data.eval names no test set"
                )


def _check_data(recipe: Recipe, places: Places) -> None:
    if recipe.data.eval is not None and recipe.data.eval_rows is not None:
        raise RecipeError(
            f"{places.of(('data', 'eval_rows'))}: data.eval names validation rows already; leave "
            f"one of them out"
        )
    if recipe.data.last_turn_only and recipe.data.loss_on == "all":
        raise RecipeError(
            f"{places.of(('data', 'last_turn_only'))}: says to learn the last turn, and "
            f"data.loss_on to learn all tokens; leave one of them out"
        )
    by_length = recipe.training.get("train_sampling_strategy") == "group_by_length"
    if by_length and recipe.data.packing:
        raise RecipeError(
            f"{places.of(('training', 'train_sampling_strategy'))}: packed blocks are all of one "
            f"length, there is nothing to group; set data.packing: false"
        )


def _check_lora(recipe: Recipe, lora: LoraSpec, places: Places) -> None:
    if recipe.method not in ("lora", "hot-lora"):
        raise RecipeError(
            f"{places.of(('lora',))}: is for the methods lora and hot-lora, not {recipe.method}"
        )
    if lora.match is not None and lora.r is not None:
        raise RecipeError(
            f"{places.of(('lora', 'match'))}: chooses the rank, and lora.r gives one; leave one of "
            f"them out"
        )
    if recipe.method == "hot-lora":
        for key in ("match", "target_modules", "target_parameters"):
            if getattr(lora, key) != LoraSpec.model_fields[key].default:
                raise RecipeError(
                    f"{places.of(('lora', key))}: is for method: lora; hot-lora adapts the "
                    f"selected experts, and nothing else"
                )


def _check_losses(losses: LossSpec, places: Places) -> None:
    if losses.device_balance and losses.devices is None:
        raise RecipeError(
            f"{places.of(('losses', 'device_balance'))}: needs losses.devices: how many devices, "
            f"or the ids of each one's experts"
        )
    if losses.devices is not None and not losses.device_balance:
        raise RecipeError(f"{places.of(('losses', 'devices'))}: is for losses.device_balance")
    if isinstance(losses.devices, int) and losses.devices < 1:
        raise RecipeError(f"{places.of(('losses', 'devices'))}: must be above 0")


def _check_train(recipe: Recipe, train: TrainSpec, places: Places) -> None:
    experts = places.of(("train", "experts"))
    if not recipe.trains_experts:
        instead = {
            "lora": "lora.target_modules says where adapters go",
            "hot-lora": "the selected experts have adapters, and nothing else trains",
            "full": "everything trains",
        }
        raise RecipeError(
            f"{places.of(('train',))}: is for the methods esft and random; with method "
            f"{recipe.method} {instead[recipe.method]}"
        )
    if train.experts == "selection":
        return
    if recipe.method == "random":
        raise RecipeError(
            f"{experts}: is {train.experts}, which leaves nothing to chance; use method: esft"
        )
    if recipe.selection is not None:
        raise RecipeError(
            f"{experts}: is {train.experts}, and selection names some; leave one of them out"
        )
    if train.experts == "none" and not any(train.parts.values()):
        raise RecipeError(
            f"{experts}: is none, and so nothing would train; turn on one of "
            f"train.{', train.'.join(train.parts)}"
        )


def _check_rule(recipe: Recipe, spec: SelectionSpec, places: Places) -> None:
    """Check the rule now: profiling the model, which comes before its use, may take long."""
    try:
        rule = spec.rule()
        if recipe.method == "random":
            rule.setdefault("random", spec.seed)
        make_rule(**rule)
    except SelectionError as error:
        # It speaks of the options of `esft select`, which the recipe has as keys.
        text = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
        key = re.match(r"\w+", text)
        assert key is not None  # every message begins with the option
        raise RecipeError(f"{places.of(('selection', key[0]))}: {text}") from None


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

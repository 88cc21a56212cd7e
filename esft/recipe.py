"""A recipe: one YAML file that states a whole run.

Keys are checked by name: an unknown one is an error that suggests the nearest. `training` takes
the fields of `transformers.TrainingArguments`. Relative paths are relative to the recipe.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esft.errors import RecipeError, nearest
from esft.loading import TINY_MOE
from esft.selection_rule import METRICS

# Fields of TrainingArguments that esft sets itself or does not honour, and why.
_NOT_HONOURED = {
    "output_dir": "the folder is given by --out",
    "resume_from_checkpoint": "resume with --resume",
    "use_cpu": "set device: cpu instead",
    "deepspeed": "a run is one process so far",
    "fsdp": "a run is one process so far",
    "fsdp_config": "a run is one process so far",
    "load_best_model_at_end": "the last step's weights are saved",
    "push_to_hub": "upload the delta's folder yourself",
    "auto_find_batch_size": "a batch size found by failing would not be reproducible",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SelectionSpec(_Strict):
    """Which experts to train: the options of `esft profile` and `esft select`."""

    metric: Literal["token", "gate"] | None = None
    p: float | None = None
    mass: Literal["share", "raw"] | None = None
    round: int | None = None
    preset: str | None = None
    top_n: int | None = None
    budget: str | int | None = None
    layers: str | int | None = None
    random: int | None = None
    tokens: int = Field(default=131_072, gt=0)
    seq_len: int = Field(default=4096, gt=0)
    count: Literal["all", "prompt", "completion"] = "all"
    seed: int = 0

    def rule(self) -> dict[str, Any]:
        """Return the keyword arguments of `esft.select` that are set."""
        sample = {"tokens", "seq_len", "count", "seed"}
        return self.model_dump(exclude=sample, exclude_none=True)


class DataSpec(_Strict):
    """Task sets, and what of them is learnt."""

    train: str
    eval: str | None = None
    loss_on: Literal["completion", "all"] = "completion"
    max_length: int = Field(default=1024, gt=1)
    packing: bool = True


class LoraSpec(_Strict):
    """PEFT's LoRA. By default on every linear layer and on all routed experts."""

    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None


class Recipe(_Strict):
    """A whole run. Defaults are those of the ESFT paper where it has one (arXiv 2407.01906)."""

    model: str
    method: Literal["esft", "random", "lora", "full"] = "esft"
    selection: str | SelectionSpec | None = None
    data: DataSpec
    training: dict[str, Any] = Field(default_factory=dict)
    lora: LoraSpec = LoraSpec()
    dtype: str = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None

    def to_yaml(self) -> str:
        """Return the recipe as YAML; reading it gives an equal recipe."""
        return yaml.safe_dump(
            self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True
        )


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides, such as `training.learning_rate=1e-3`.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown or its value is wrong; the
            message has the file and line, or the override.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read this recipe: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys (model, data, ...)")
    return make_recipe(value, overrides, where=_Places(path, node), folder=path.parent)


def make_recipe(
    value: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    where: _Places | None = None,
    folder: Path | None = None,
) -> Recipe:
    """Check a recipe given as nested mappings, with overrides applied.

    Args:
        value: as read from YAML.
        overrides: `key=value` with dots between nested keys; values are YAML.
        where: finds the line of a key for messages.
        folder: what relative paths in `value` are relative to; those in overrides are relative
            to the working directory.

    Raises:
        RecipeError: see `read_recipe`.
    """
    where = where or _Places(None, None)
    changed = _deep_copy(value)
    if folder is not None:
        _make_paths_absolute(changed, folder)
    for override in overrides:
        where.overridden.append(_apply(changed, override))
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None
    _check_training(recipe.training, where)
    _check_together(recipe, where)
    return recipe


def recipe_from_options(model: str, train: str, overrides: Iterable[str] = ()) -> Recipe:
    """Make a recipe from a model, training rows and `key=value` overrides.

    Raises:
        RecipeError: `model` is a recipe itself, or an override is wrong.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        raise RecipeError(f"--data: is for a model; {model} is a recipe and names its own data")
    return make_recipe({"model": model, "data": {"train": train}}, overrides)


def override(key: str, value: Any) -> str:
    """Return the `key=value` that sets a key to a value."""
    return f"{key}={json.dumps(value)}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; people, and YAML 1.2, mean a number."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Places:
    """Finds where a key was set: a line of the recipe, or an override."""

    def __init__(self, path: Path | None, node: Any) -> None:
        self.path, self.node = path, node
        self.overridden: list[tuple[str, ...]] = []

    def of(self, key: tuple[str, ...]) -> str:
        """Return `recipe.yaml:3: a.b`, `--set a.b` or `a.b`."""
        dotted = ".".join(key)
        if any(key[: len(o)] == o or o[: len(key)] == key for o in self.overridden if key):
            return f"--set {dotted}"
        if self.path is None:
            return dotted or "recipe"
        return f"{self.path}:{self._line(key)}" + (f": {dotted}" if dotted else "")

    def _line(self, key: tuple[str, ...]) -> int:
        node, line = self.node, 1
        for part in key:
            for name, child in getattr(node, "value", None) or []:
                if getattr(name, "value", None) == part:
                    node, line = child, name.start_mark.line + 1
                    break
            else:
                break
            if not isinstance(node, yaml.MappingNode):
                break
        return line


def _apply(value: dict[str, Any], override: str) -> tuple[str, ...]:
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise RecipeError(f"--set {override}: write key=value, such as training.max_steps=100")
    try:
        parsed = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML") from None
    place = value
    for part in parts[:-1]:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[parts[-1]] = parsed
    return parts


def _explain(error: ValidationError, where: _Places) -> str:
    first = error.errors()[0]
    # pydantic adds the branch of a union to the path; keys of the recipe are lower-case.
    path = tuple(str(p) for p in first["loc"] if str(p) not in ("str", "SelectionSpec"))
    place = where.of(path)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(path[-1], _known(path[:-1]))}"
    if first["type"] == "missing":
        return f"{where.of(path[:-1])}: the key {'.'.join(path)} is missing"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"


def _known(path: tuple[str, ...]) -> list[str]:
    sections: dict[tuple[str, ...], type[BaseModel]] = {
        ("data",): DataSpec,
        ("selection",): SelectionSpec,
        ("lora",): LoraSpec,
    }
    return list(sections.get(path, Recipe).model_fields)


def _check_training(training: Mapping[str, Any], where: _Places) -> None:
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key, value in training.items():
        place = where.of(("training", key))
        if key not in known:
            hint = nearest(key, known) or "; training takes the fields of TrainingArguments"
            raise RecipeError(f"{place}: unknown key{hint}")
        if key in _NOT_HONOURED and value:
            raise RecipeError(f"{place}: cannot be set: {_NOT_HONOURED[key]}")


def _check_together(recipe: Recipe, where: _Places) -> None:
    if recipe.method in ("lora", "full") and recipe.selection is not None:
        raise RecipeError(
            f"{where.of(('selection',))}: method {recipe.method} trains no selection; "
            f"leave it out, or use method: esft"
        )
    if recipe.method == "random" and isinstance(recipe.selection, str):
        raise RecipeError(
            f"{where.of(('selection',))}: method random draws its own experts, as many as a rule "
            f"would pick; give the rule ({'|'.join(METRICS)}, p, ...) instead of a file"
        )


def _make_paths_absolute(value: dict[str, Any], folder: Path) -> None:
    data = value.get("data")
    if isinstance(data, dict):
        for key in ("train", "eval"):
            if isinstance(data.get(key), str):
                data[key] = _absolute(data[key], folder)
    if isinstance(value.get("selection"), str):
        value["selection"] = _absolute(value["selection"], folder)
    model = value.get("model")
    # A hub id looks like a relative path; it is one only if the folder is there.
    if isinstance(model, str) and model != TINY_MOE and (folder / model).is_dir():
        value["model"] = _absolute(model, folder)


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    return [_deep_copy(item) for item in value] if isinstance(value, list) else value

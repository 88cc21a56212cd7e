"""The methods of a comparison by name: which keys of the base recipe each of them replaces.

`esft-token` and `esft-gate` name the metric that experts are selected by. Every other method that
selects takes the base recipe's rule, whose metric is `token` unless it says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esft.errors import RecipeError, nearest

# Of sections that a method has no use for. None means that the key is left out.
_NO_SELECTION: dict[str, Any] = {
    "selection": None,
    "train": None,
    "param_dtype": None,
    "frozen_dtype": None,
}


@dataclass(frozen=True)
class ComparedMethod:
    """A method of a comparison.

    Attributes:
        description: one line for a reader of tables.
        keys: nested as in a recipe: a mapping is merged into the base recipe's section of its
            name (which it replaces where that is no mapping), any other value replaces the base
            recipe's, and None leaves the key out.
    """

    description: str
    keys: Mapping[str, Any]


def _esft(description: str, **parts: Any) -> ComparedMethod:
    keys: dict[str, Any] = {"method": "esft", "lora": None, "train": parts or None}
    if parts.get("experts", "selection") != "selection":
        keys["selection"] = None
    return ComparedMethod(description, keys)


def _selected(description: str, method: str, **rule: Any) -> ComparedMethod:
    keys: dict[str, Any] = {"method": method, "lora": None, "train": None}
    return ComparedMethod(description, keys | {"selection": {"random_from": None, **rule}})


METHODS: dict[str, ComparedMethod] = {
    "esft-token": _selected(
        "the experts that most tokens choose (TSR) train", "esft", metric="token"
    ),
    "esft-gate": _selected(
        "the experts with the highest gate scores (AGS) train", "esft", metric="gate"
    ),
    "random": _selected(
        "control: as many experts per layer as the rule picks, drawn from all", "random"
    ),
    "random-unselected": _selected(
        "control: as many experts per layer as the rule picks, drawn from those it leaves out",
        "random",
        random_from="unselected",
    ),
    "lora": ComparedMethod(
        "PEFT's LoRA on attention, every other linear layer and all experts, but no router",
        {"method": "lora", "lora": {"match": None}, **_NO_SELECTION},
    ),
    "lora-matched": ComparedMethod(
        "the same, of the rank whose adapter has about the bytes of ESFT's delta",
        {
            "method": "lora",
            "lora": {"match": "esft", "r": None, "alpha": None},
            "train": None,
            "param_dtype": None,
            "frozen_dtype": None,
        },
    ),
    "hot-lora": ComparedMethod(
        "LoRA on the selected experts, and nothing else",
        {
            "method": "hot-lora",
            "lora": {"match": None, "target_modules": None, "target_parameters": None},
            "train": None,
        },
    ),
    "full": ComparedMethod(
        "every parameter trains", {"method": "full", "lora": None, **_NO_SELECTION}
    ),
    "esft-shared": _esft("the selected experts and the shared ones train", shared_experts=True),
    "esft-non-expert": _esft(
        "the selected experts and what is no expert train (routers stay)", non_expert_modules=True
    ),
    "esft-shared-non-expert": _esft(
        "the selected experts, the shared ones and what is no expert train",
        shared_experts=True,
        non_expert_modules=True,
    ),
    "shared": _esft("only the shared experts train", experts="none", shared_experts=True),
    "non-expert": _esft(
        "only what is no expert trains (routers stay)", experts="none", non_expert_modules=True
    ),
    "shared-non-expert": _esft(
        "the shared experts and what is no expert train; no routed expert",
        experts="none",
        shared_experts=True,
        non_expert_modules=True,
    ),
    "all-experts": _esft("all routed experts train, and nothing else", experts="all"),
}


def method_keys(name: str) -> dict[str, Any]:
    """Return the keys by which a method's recipe differs from the base recipe.

    Args:
        name: a key of `METHODS`.

    Returns:
        a copy of `ComparedMethod.keys`, which says how they are merged.

    Raises:
        RecipeError: there is no such method; the nearest name is suggested.
    """
    if name not in METHODS:
        close = nearest(name, METHODS) or f"; choose from {', '.join(METHODS)}"
        raise RecipeError(f'there is no method "{name}" to compare{close}')
    return copy.deepcopy(dict(METHODS[name].keys))


def with_keys(base: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe, given as nested mappings, with some keys replaced.

    Args:
        base: the recipe; not changed.
        keys: as `ComparedMethod.keys`.
    """
    merged = copy.deepcopy(dict(base))
    for key, value in keys.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            inner = merged.get(key)
            merged[key] = with_keys(inner if isinstance(inner, Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged

"""Sweeps: one key of every method that has it, over several values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esft.errors import RecipeError, nearest

# What can be swept -> the recipe's key. A method without the key's section is left out.
SWEEPABLE: dict[str, tuple[str, str]] = {
    "p": ("selection", "p"),
    "rank": ("lora", "r"),
    "sample_tokens": ("selection", "tokens"),
    "top_n": ("selection", "top_n"),
    "group": ("selection", "group"),
}
_WHOLE = {"rank", "sample_tokens", "top_n", "group"}
_SELECTS, _ADAPTS = {"esft", "random", "hot-lora"}, {"lora", "hot-lora"}


def parse_sweep(text: str) -> tuple[str, list[int | float]]:
    """Read `p=0.1,0.2` as the command line has it.

    Raises:
        RecipeError: it is nothing like that.
    """
    key, equals, given = text.partition("=")
    try:
        values = [
            int(item) if item.strip().isdecimal() else float(item) for item in given.split(",")
        ]
    except ValueError:
        values = []
    if not equals or not values:
        raise RecipeError(f"--sweep {text}: write key=value,value, such as p=0.05,0.1,0.2")
    check_sweep(key, values, f"--sweep {key}")
    return key, values


def check_sweep(key: str, values: Sequence[int | float], place: str) -> None:
    """Check that a key can be swept over some values.

    Args:
        key: one of `SWEEPABLE`.
        values: of it.
        place: where they were given, for messages.

    Raises:
        RecipeError: it cannot.
    """
    if key not in SWEEPABLE:
        hint = nearest(key, list(SWEEPABLE)) or f"; there are {', '.join(SWEEPABLE)}"
        raise RecipeError(f"{place}: cannot be swept{hint}")
    if not values or len(set(values)) != len(values):
        raise RecipeError(f"{place}: give one or more values, each once (got {list(values)})")
    if key in _WHOLE and any(not isinstance(value, int) for value in values):
        raise RecipeError(f"{place}: takes whole numbers (got {list(values)})")


def applies(key: str, keys: Mapping[str, Any]) -> bool:
    """Say whether a method has what is swept.

    Args:
        key: one of `SWEEPABLE`.
        keys: of the method's recipe, nested.
    """
    method = keys.get("method", "esft")
    if SWEEPABLE[key][0] == "lora":
        # A rank that is chosen to match something is not for sweeping.
        return method in _ADAPTS and "match" not in (keys.get("lora") or {})
    selection = keys.get("selection")
    trains = (keys.get("train") or {}).get("experts", "selection")
    return method in _SELECTS and trains == "selection" and not isinstance(selection, str)


def swept(key: str, value: int | float, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's keys with the swept one set.

    Args:
        key: one of `SWEEPABLE`.
        value: of it.
        keys: of the method's recipe, nested.
    """
    section, name = SWEEPABLE[key]
    inner = {**(keys.get(section) or {}), name: value}
    if key == "top_n":  # in place of a share
        inner.pop("p", None)
    return {**keys, section: inner}

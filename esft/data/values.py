"""Checks of single values in a row of data; each error names the row and what is wrong there."""

from __future__ import annotations

import json
import math
from typing import Any

from esft.errors import DataError

_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def kind(value: Any) -> str:
    """Name a value's type with its article, in JSON's words where JSON has it."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def text(
    value: Any, name: str, where: str, *, answer: bool = False, may_be_empty: bool = False
) -> str:
    """Return `value` if it is usable text.

    Args:
        value: anything.
        name: what the message calls it.
        where: `file:line`.
        answer: whether a row without it has no answer.
        may_be_empty: whether white space will do.

    Raises:
        DataError: it is not a string, has nothing but white space, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value)}; expected a string")
    if not value.strip() and not may_be_empty:
        what = "a line without an answer: " if answer else ""
        raise DataError(f"{where}: {what}{name} is empty")
    _check_encodable(value, name, where)
    return value


def objects(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Return `value` if it is a list of objects, given as such or as JSON text.

    Columns of tables hold tools as text, because their keys differ from row to row.

    Raises:
        DataError: it is anything else.
    """
    if isinstance(value, str):
        value = parsed(value, name, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {kind(value)}; expected a list of objects")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{where}: {name}[{i}] is {kind(item)}; expected an object")
    _check_encodable(json.dumps(value, ensure_ascii=False, default=str), name, where)
    return value


def parsed(value: str, name: str, where: str) -> Any:
    """Return what JSON text says.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is text that is not JSON: {error}") from None


def weight(value: Any, name: str, where: str) -> float:
    """Return `value` if it is a number that a loss can be multiplied with.

    Raises:
        DataError: it is no number, negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: {name} is {kind(value)}; expected a number")
    if not (math.isfinite(value) and value >= 0):
        raise DataError(f"{where}: {name} is {value}; expected 0 or more")
    return float(value)


def _check_encodable(value: str, name: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair; no tokenizer takes it.
        raise DataError(
            f"{where}: {name} has half of a surrogate pair (\\u{ord(value[error.start]):x}) "
            f"at character {error.start + 1}"
        ) from None

"""JSON equality: whether an answer is the JSON value that the reference is, however written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from esft.data.row import Row
from esft.errors import DataError
from esft.measures.metric import Answer, Scores


def score(answers: Sequence[Answer]) -> Scores:
    """Return 1 for each answer whose whole text is JSON and equal to the reference's value.

    White space and the order of an object's keys do not matter; 1 and 1.0 are one number, true is
    none. An object that names a key twice equals nothing.
    """
    return Scores([float(_equal(answer)) for answer in answers])


def check(row: Row, reference: str) -> None:
    """Refuse a reference that is no JSON.

    Raises:
        DataError: it is not.
    """
    try:
        _parse(reference)
    except ValueError as error:
        raise DataError(
            f"{row.where}: json_equal: the reference answer is not JSON: {error}"
        ) from None


def _equal(answer: Answer) -> bool:
    try:
        found = _parse(answer.text)
    except ValueError:
        return False
    return _plain(found) == _plain(_parse(answer.reference))


def _parse(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("an object names a key twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _plain(value: Any) -> Any:
    """Mark true and false, which Python takes for the numbers 1 and 0."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value

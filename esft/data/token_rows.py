"""Rows that were turned into tokens before, as TRL and transformers' data collators write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esft.data.row import Row
from esft.data.values import kind
from esft.errors import DataError

_IGNORED = -100  # the label of a token that is not learnt
_MASKS = ("completion_mask", "assistant_masks")


def tokenized_row(value: Mapping[str, Any], where: str) -> Row:
    """Read `input_ids`, and which of them are learnt.

    A token is learnt if `labels`, `completion_mask` and `assistant_masks` all say so, as far as
    they are there. Labels stand at the place of their token. Padding, which `attention_mask`
    tells, is taken off.

    Raises:
        DataError: a list is missing, empty or of another length, or holds anything unexpected;
            nothing is learnt; or the row is a packed block of several.
    """
    ids = _whole_numbers(value["input_ids"], "input_ids", where)
    if not ids:
        raise DataError(f"{where}: `input_ids` is empty")
    if min(ids) < 0:
        raise DataError(f"{where}: `input_ids` has {min(ids)}; expected 0 or more")
    _refuse_packed(value, len(ids), where)
    learnt = [True] * len(ids)
    for key in (*_MASKS, "labels"):
        if value.get(key) is None:
            continue
        flags = (
            _labelled(_same_length(value, key, ids, where), ids, where)
            if key == "labels"
            else _flags(_same_length(value, key, ids, where), key, where)
        )
        learnt = [a and b for a, b in zip(learnt, flags, strict=True)]
    start, stop = _real(value, ids, where)
    if not any(learnt[start:stop]):
        raise DataError(f"{where}: no token is to be learnt")
    return Row(where, input_ids=tuple(ids[start:stop]), supervised=tuple(learnt[start:stop]))


def _whole_numbers(value: Any, key: str, where: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{key}` is {kind(value)}; expected a list of whole numbers")
    for i, item in enumerate(value):
        if type(item) is not int:
            raise DataError(f"{where}: `{key}[{i}]` is {item!r}; expected a whole number")
    return value


def _same_length(value: Mapping[str, Any], key: str, ids: list[int], where: str) -> list[int]:
    found = value[key]
    if isinstance(found, list):
        found = [int(item) if isinstance(item, bool) else item for item in found]
    numbers = _whole_numbers(found, key, where)
    if len(numbers) != len(ids):
        raise DataError(
            f"{where}: `{key}` has {len(numbers):,} items, but `input_ids` has {len(ids):,}"
        )
    return numbers


def _flags(numbers: Sequence[int], key: str, where: str) -> list[bool]:
    for i, number in enumerate(numbers):
        if number not in (0, 1):
            raise DataError(f"{where}: `{key}[{i}]` is {number}; expected 0 or 1")
    return [bool(number) for number in numbers]


def _labelled(labels: Sequence[int], ids: Sequence[int], where: str) -> list[bool]:
    for i, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (_IGNORED, token):
            raise DataError(
                f"{where}: `labels[{i}]` is {label}, but `input_ids[{i}]` is {token}; expected "
                f"each token's own id (not shifted), or {_IGNORED} where it is not learnt"
            )
    return [label != _IGNORED for label in labels]


def _real(value: Mapping[str, Any], ids: list[int], where: str) -> tuple[int, int]:
    """Return where the tokens start and stop that are not padding."""
    if value.get("attention_mask") is None:
        return 0, len(ids)
    real = _flags(_same_length(value, "attention_mask", ids, where), "attention_mask", where)
    if not any(real):
        raise DataError(f"{where}: `attention_mask` is 0 everywhere")
    start, stop = real.index(True), len(real) - real[::-1].index(True)
    if not all(real[start:stop]):
        raise DataError(
            f"{where}: `attention_mask` is 0 in the middle (item {real.index(False, start)}); "
            f"expected padding at the ends only"
        )
    return start, stop


def _refuse_packed(value: Mapping[str, Any], length: int, where: str) -> None:
    lengths, positions = value.get("seq_lengths"), value.get("position_ids")
    several = isinstance(lengths, list) and len(lengths) > 1
    restarts = positions is not None and positions != list(range(length))
    if several or restarts:
        key = "seq_lengths" if several else "position_ids"
        raise DataError(
            f"{where}: a packed block of several rows (`{key}`); give the rows before they were "
            f"packed, data.packing packs them"
        )

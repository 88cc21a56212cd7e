"""Formats of a row: which one it has, and how it becomes a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from esft.data.conversations import messages_row, prompted_row, sharegpt_row
from esft.data.row import Row
from esft.data.token_rows import tokenized_row
from esft.data.values import kind, text
from esft.errors import DataError

Format = Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text", "tokenized"]
FormatOrAuto = Literal[Format, "auto"]
FORMATS: tuple[Format, ...] = get_args(Format)

# The keys without which a row does not have the format. Some published conversations repeat their
# first turn as `prompt`; that is no second format.
_MARKS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("completion",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "tokenized": ("input_ids",),
}
# Of a table, the columns that hold lists; a CSV file has them as JSON.
STRUCTURED = (
    *("messages", "conversations", "tools"),
    *("input_ids", "labels", "completion_mask", "assistant_masks"),
    *("attention_mask", "position_ids", "seq_lengths"),
)
_CODE = ("tests", "setup")  # rows of any format may have them, for pass_at_1
EXPECTED = (
    "expected `messages`, `prompt` and `completion`, `instruction` and `output` (alpaca), "
    "`conversations` (sharegpt), `text` or `input_ids` (tokenized)"
)
_ASK = "say which with data.format (--format)"
# What a row has that is nearly of a format, and what it lacks.
_HALVES = {"prompt": "completion", "instruction": "output"}


def detect(value: Mapping[str, Any], where: str) -> Format:
    """Return the format that a row has.

    Raises:
        DataError: it has none, or more than one.
    """
    fits = [name for name, keys in _MARKS.items() if all(value.get(k) is not None for k in keys)]
    # A table has null where a row lacks a column. A key that is null is still the nearest thing.
    fits = fits or [name for name, keys in _MARKS.items() if all(k in value for k in keys)]
    if len(fits) > 1:
        names = " and ".join(f"{name} ({_quoted(_MARKS[name])})" for name in fits)
        raise DataError(f"{where}: the row fits the formats {names}; {_ASK}")
    if fits:
        return fits[0]
    for half, lacking in _HALVES.items():
        if half in value:
            raise DataError(f"{where}: a line without an answer: no `{lacking}`")
    found = ", ".join(f"`{key}`" for key in list(value)[:5]) or "no keys"
    raise DataError(f"{where}: found {found}; {EXPECTED}")


def make_row(value: Mapping[str, Any], where: str, format: Format) -> Row:
    """Make a row of a JSON object that has the format; keys that are not the format's are ignored.

    Raises:
        DataError: it does not; the message starts with `where`.
    """
    for key in _MARKS[format]:
        if key not in value:
            raise DataError(f"{where}: no `{key}`, which the format {format} needs")
    row = _MAKERS[format](value, where)
    if all(value.get(key) is None for key in _CODE):
        return row
    tests, setup = (_code(value.get(key), key, where) for key in _CODE)
    return replace(row, tests=tests, setup=setup)


def _code(value: Any, key: str, where: str) -> str:
    """Return Python code that is given as text, or as a list of statements; empty for None."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return text(value, f"`{key}`", where, may_be_empty=True)


def _prompt_completion(value: Mapping[str, Any], where: str) -> Row:
    if value.get("prompt") is None:
        raise DataError(f"{where}: no `prompt`; the format prompt-completion needs it")
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompted_row(value, where)
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(
            f"{where}: `prompt` is {kind(prompt)} and `completion` is {kind(completion)}; "
            f"expected two strings, or two lists of messages"
        )
    return Row(
        where,
        prompt=text(prompt, "`prompt`", where),
        completion=text(completion, "`completion`", where, answer=True),
    )


def _plain_text(value: Mapping[str, Any], where: str) -> Row:
    return Row(where, text=text(value["text"], "`text`", where))


def _alpaca(value: Mapping[str, Any], where: str) -> Row:
    """Write the prompt of Stanford's Alpaca (Taori et al. 2023) around an instruction.

    `system` takes the place of its first sentences.
    """
    if value.get("history"):
        raise DataError(f"{where}: `history` has earlier turns; write them as `messages`")
    instruction = text(value["instruction"], "`instruction`", where)
    given = _optional(value, "input", where)
    system = _optional(value, "system", where)
    if not system:
        paired = ", paired with an input that provides further context" if given else ""
        system = (
            f"Below is an instruction that describes a task{paired}. "
            f"Write a response that appropriately completes the request."
        )
    parts = [system, f"### Instruction:\n{instruction}"]
    if given:
        parts.append(f"### Input:\n{given}")
    return Row(
        where,
        prompt="\n\n".join([*parts, "### Response:\n"]),
        completion=text(value["output"], "`output`", where, answer=True),
    )


def _optional(value: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text of a key; empty where it is missing, null or white space."""
    if value.get(key) is None:
        return ""
    found = text(value[key], f"`{key}`", where, may_be_empty=True)
    return found if found.strip() else ""


def _quoted(keys: tuple[str, ...]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


_MAKERS: dict[Format, Callable[[Mapping[str, Any], str], Row]] = {
    "messages": messages_row,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": sharegpt_row,
    "text": _plain_text,
    "tokenized": tokenized_row,
}

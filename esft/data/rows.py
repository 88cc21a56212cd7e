"""Rows of a task set, read from JSONL: one object a line, `prompt`/`completion` or `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esft.data.row import ROLES, Message, Row
from esft.errors import DataError

__all__ = ["Message", "Row", "read_rows"]

_EXPECTED = "expected `prompt` and `completion`, or `messages`"
# Instructions and tool results may well be empty; a question and an answer may not.
_MAY_BE_EMPTY = ("system", "tool")


def read_rows(path: str | Path) -> list[Row]:
    """Read a task set from a JSONL file.

    UTF-8; a byte-order mark, Windows line ends and blank lines do not matter, keys other than
    the format's own are ignored. All rows have the same format.

    Raises:
        DataError: the file cannot be read, or holds no rows, or a line cannot be used; the
            message starts with `file:` or `file:line:`.
    """
    path = Path(path)
    rows: list[Row] = []
    try:
        with path.open("rb") as file:
            # Bytes split at "\n" only; text would also split at U+2028, which JSON allows.
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                text = _decode(line, where, first=number == 1)
                if text.strip():
                    rows.append(_row(text, where))
                    _same_format(rows)
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read this data file: {error.strerror}") from None
    if not rows:
        raise DataError(f"{path}: the file has no rows; {_EXPECTED}, one JSON object a line")
    return rows


def _decode(line: bytes, where: str, *, first: bool) -> str:
    if b"\0" in line:
        raise DataError(
            f"{where}: a NUL byte; expected UTF-8 text (is the file UTF-16, or damaged?)"
        )
    try:
        # A byte-order mark is a mark only at the very start.
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}; "
            f"save the file as UTF-8"
        ) from None


def _row(text: str, where: str) -> Row:
    value = _parse(text, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_kind(value)}, not an object; {_EXPECTED}")
    # Some published conversations repeat their first turn as `prompt`; that is no second format.
    if "messages" in value:
        if "completion" in value:
            raise DataError(f"{where}: both `messages` and `completion`; keep one of them")
        return Row(where, messages=_messages(value["messages"], where))
    if "prompt" not in value and "completion" not in value:
        found = ", ".join(f"`{key}`" for key in list(value)[:5]) or "no keys"
        raise DataError(f"{where}: found {found}; {_EXPECTED}")
    if "completion" not in value:
        raise DataError(f"{where}: a line without an answer: no `completion`")
    if "prompt" not in value:
        raise DataError(f"{where}: no `prompt`; {_EXPECTED}")
    return Row(
        where,
        prompt=_text(value["prompt"], "`prompt`", where),
        completion=_text(value["completion"], "`completion`", where, answer=True),
    )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Nothing but white space after the place where the parser gave up: the end is missing.
        if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
            raise DataError(
                f"{where}: not JSON: the line ends in the middle of a value (cut off?); "
                f"expected one complete object a line"
            ) from None
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.pos + 1}; "
            f"expected one complete object a line"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number too long
        raise DataError(f"{where}: not usable JSON: {error}") from None


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `messages` is {_kind(value)}; expected a list of turns")
    if not value:
        raise DataError(f"{where}: a line without an answer: `messages` is empty")
    turns = tuple(_message(item, f"`messages[{i}]`", where) for i, item in enumerate(value))
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: a line without an answer: the last message is the {turns[-1].role}'s; "
            f"expected the assistant's"
        )
    return turns


def _message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: {name} is {_kind(value)}; expected an object with `role` and `content`"
        )
    for key in ("role", "content"):
        if key not in value:
            raise DataError(f"{where}: {name} has no `{key}`")
    role = value["role"]
    if role not in ROLES:
        raise DataError(
            f"{where}: {name} has the unknown role {json.dumps(role, ensure_ascii=False)}; "
            f"expected one of {', '.join(ROLES)}"
        )
    # Dropping them would teach the model to answer nothing where it should call a tool.
    if value.get("tool_calls"):
        raise DataError(f"{where}: {name} has `tool_calls`, which esft cannot train on")
    content = _text(
        value["content"],
        f"the content of {name}",
        where,
        answer=role == "assistant",
        may_be_empty=role in _MAY_BE_EMPTY,
    )
    return Message(role, content)


def _text(
    value: Any, name: str, where: str, *, answer: bool = False, may_be_empty: bool = False
) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_kind(value)}; expected a string")
    if not value.strip() and not may_be_empty:
        what = "a line without an answer: " if answer else ""
        raise DataError(f"{where}: {what}{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair; no tokenizer takes it.
        raise DataError(
            f"{where}: {name} has half of a surrogate pair (\\u{ord(value[error.start]):x}) "
            f"at character {error.start + 1}"
        ) from None
    return value


def _same_format(rows: list[Row]) -> None:
    first, last = rows[0], rows[-1]
    if last.format != first.format:
        raise DataError(
            f"{last.where}: a row with {last.format}, but {first.where} has {first.format}; "
            f"one file has one format"
        )


def _kind(value: Any) -> str:
    """Name a JSON value's type with its article."""
    names: dict[type, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]

"""Conversations: lists of turns as OpenAI, TRL and ShareGPT write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from esft.data.row import ROLES, Message, Row
from esft.data.values import kind, objects, parsed, text, weight
from esft.errors import DataError

# Instructions and tool results may well be empty; a question and an answer may not.
_MAY_BE_EMPTY = ("system", "tool")
# Further keys of a turn that chat templates read.
_TEMPLATE_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")
# ShareGPT's names of the roles, as the tools that write it have extended them.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def messages_row(value: Mapping[str, Any], where: str) -> Row:
    """Read `messages`, and `tools` if there are any.

    Raises:
        DataError: a turn cannot be used, or the last one is not the assistant's.
    """
    turns = _turns(value["messages"], "messages", where)
    return Row(where, messages=_answered(turns, "messages", where), tools=_tools(value, where))


def prompted_row(value: Mapping[str, Any], where: str) -> Row:
    """Read `prompt` and `completion` that are lists of turns (TRL); only the latter is learnt.

    Raises:
        DataError: one of them is no list, a turn cannot be used, or there is no answer.
    """
    prompt = _turns(value["prompt"], "prompt", where)
    completion = _answered(_turns(value["completion"], "completion", where), "completion", where)
    return Row(where, messages=prompt + completion, given=len(prompt), tools=_tools(value, where))


def sharegpt_row(value: Mapping[str, Any], where: str) -> Row:
    """Read `conversations`, with `system` in front and `tools` if there are any.

    Raises:
        DataError: a turn cannot be used, or the last one is not the assistant's.
    """
    turns = _turns(value["conversations"], "conversations", where, sharegpt=True)
    instruction = value.get("system")
    if instruction is not None and text(instruction, "`system`", where, may_be_empty=True).strip():
        if turns and turns[0].role == "system":
            raise DataError(f"{where}: `system` and a system turn; keep one of them")
        turns = (Message("system", instruction), *turns)
    answered = _answered(turns, "conversations", where)
    return Row(where, messages=answered, tools=_tools(value, where))


def _turns(value: Any, key: str, where: str, *, sharegpt: bool = False) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{key}` is {kind(value)}; expected a list of turns")
    read = _sharegpt_turn if sharegpt else _turn
    return tuple(read(item, f"`{key}[{i}]`", where) for i, item in enumerate(value))


def _answered(turns: tuple[Message, ...], key: str, where: str) -> tuple[Message, ...]:
    if not turns:
        raise DataError(f"{where}: a line without an answer: `{key}` is empty")
    if turns[-1].role != "assistant":
        raise DataError(
            f"{where}: a line without an answer: the last message is the {turns[-1].role}'s; "
            f"expected the assistant's"
        )
    return turns


def _turn(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: {name} is {kind(value)}; expected an object with `role` and `content`"
        )
    if "role" not in value:
        raise DataError(f"{where}: {name} has no `role`")
    role = value["role"]
    if role not in ROLES:
        raise _unknown_role(role, ROLES, name, where)
    if value.get("function_call"):
        # Dropped, it would teach the model to answer nothing where it should call a function.
        raise DataError(f"{where}: {name} has `function_call`; write it as `tool_calls`")
    calls = _tool_calls(value.get("tool_calls"), role, name, where)
    if "content" not in value and not calls:
        raise DataError(f"{where}: {name} has no `content`")
    content = value.get("content")
    return Message(
        role,
        ""
        if content is None and calls
        else text(
            content,
            f"the content of {name}",
            where,
            answer=role == "assistant",
            may_be_empty=role in _MAY_BE_EMPTY or bool(calls),
        ),
        _weight(value, role, name, where),
        calls,
        {
            key: text(value[key], f"`{key}` of {name}", where, may_be_empty=True)
            for key in _TEMPLATE_KEYS
            if value.get(key) is not None
        },
    )


def _sharegpt_turn(value: Any, name: str, where: str) -> Message:
    if isinstance(value, dict) and "from" not in value and "role" in value:
        return _turn(value, name, where)  # many sets have ShareGPT's key and OpenAI's turns
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: {name} is {kind(value)}; expected an object with `from` and `value`"
        )
    for key in ("from", "value"):
        if key not in value:
            raise DataError(f"{where}: {name} has no `{key}`")
    sender = value["from"]
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise _unknown_role(sender, tuple(_SHAREGPT_ROLES), name, where)
    turn = {key: value[key] for key in ("weight", *_TEMPLATE_KEYS) if key in value}
    turn["role"] = _SHAREGPT_ROLES[sender]
    if sender == "function_call":
        called = f"the value of {name}"
        calls = parsed(text(value["value"], called, where, answer=True), called, where)
        turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
        if not turn["tool_calls"]:
            raise DataError(f"{where}: a line without an answer: {called} calls nothing")
    else:
        turn["content"] = value["value"]
    return _turn(turn, name, where)


def _weight(value: Mapping[str, Any], role: str, name: str, where: str) -> float | None:
    if value.get("weight") is None:
        return None
    found = weight(value["weight"], f"the weight of {name}", where)
    if role == "assistant":
        return found
    if found:
        raise DataError(
            f"{where}: {name} has a weight of {found:g}, but only the assistant's turns are learnt"
        )
    return None


def _unknown_role(role: Any, known: tuple[str, ...], name: str, where: str) -> DataError:
    return DataError(
        f"{where}: {name} has the unknown role {json.dumps(role, ensure_ascii=False, default=str)};"
        f" expected one of {', '.join(known)}"
    )


# Tools


def _tools(value: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    found = value.get("tools")
    if found is None or found == "":
        return ()
    return tuple(objects(found, "`tools`", where))


def _tool_calls(value: Any, role: str, name: str, where: str) -> tuple[dict[str, Any], ...]:
    if not value:
        return ()
    calls = objects(value, f"`tool_calls` of {name}", where)
    if calls and role != "assistant":
        raise DataError(f"{where}: {name} has `tool_calls`, but its role is {role}")
    return tuple(
        _tool_call(call, f"`tool_calls[{i}]` of {name}", where) for i, call in enumerate(calls)
    )


def _tool_call(value: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return a call with its function inside, as templates expect it, and parsed arguments."""
    bare = "function" not in value
    function = value if bare else value["function"]
    if not isinstance(function, dict):
        raise DataError(f"{where}: the function of {name} is {kind(function)}; expected an object")
    called = text(function.get("name"), f"the function's name in {name}", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():  # OpenAI's way to write them
        arguments = parsed(arguments, f"`arguments` of {name}", where)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: `arguments` of {name} is {kind(arguments)}; expected an object, or its JSON"
        )
    rest = {} if bare else {key: item for key, item in value.items() if key != "function"}
    return {"type": "function", **rest, "function": {"name": called, "arguments": arguments}}

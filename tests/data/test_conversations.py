"""Conversations: turns, tools and their calls, weights, ShareGPT's names."""

import json
from typing import Any

import pytest

from esft.data.formats import detect, make_row
from esft.data.row import Message, Row
from esft.errors import DataError

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ARGUMENTS = {"a": 1, "b": [2.5, None, "é"]}
CALL = {"type": "function", "id": "7", "function": {"name": "add", "arguments": ARGUMENTS}}


def row(value: dict[str, Any]) -> Row:
    return make_row(value, "f:1", detect(value, "f:1"))


def chat(*turns: dict[str, Any], **more: Any) -> Row:
    return row({"messages": list(turns), **more})


def answer(**keys: Any) -> Row:
    return chat(HI, {"role": "assistant", **keys})


def refused(*turns: dict[str, Any], key: str = "messages", **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        row({key: list(turns), **more})
    return str(caught.value).removeprefix("f:1: ")


# Tools


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_as_a_list_or_its_json(tools: Any) -> None:
    assert chat(HI, YO, tools=tools).tools == tuple(TOOLS)


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools(tools: Any) -> None:
    assert chat(HI, YO, tools=tools).tools == ()


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("add", "`tools` is text that is not JSON"),
        ('"add"', "`tools` is a string; expected a list of objects"),
        ({"name": "add"}, "`tools` is an object; expected a list of objects"),
        ([TOOLS[0], "add"], "`tools`[1] is a string; expected an object"),
        ([{"name": "\ud800"}], "`tools` has half of a surrogate pair"),
    ],
)
def test_bad_tools(tools: Any, said: str) -> None:
    assert said in refused(HI, YO, tools=tools)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL | {"function": {"name": "add", "arguments": json.dumps(ARGUMENTS)}},
    ],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_with_arguments_as_an_object_or_its_json(call: Any, content: Any) -> None:
    found = answer(tool_calls=[call], **content).messages[1]
    assert found == Message("assistant", "", tool_calls=(CALL,))
    assert found.to_dict() == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_a_call_without_its_wrapping() -> None:
    (_, found) = answer(tool_calls=[{"name": "now"}], content="Let me see.").messages
    assert found.content == "Let me see."
    assert found.tool_calls == ({"type": "function", "function": {"name": "now", "arguments": {}}},)


def test_a_whole_call_and_its_result() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "3.5", "name": "add", "tool_call_id": "7", "x": 1}
    found = chat(HI, calls, result, YO, tools=TOOLS)
    assert [m.to_dict() for m in found.messages] == [
        HI,
        calls,
        {"role": "tool", "content": "3.5", "name": "add", "tool_call_id": "7"},
        YO,
    ]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("add", "`tool_calls` of `messages[1]` is text that is not JSON"),
        ([7], "`tool_calls` of `messages[1]`[0] is a number"),
        ([{"function": "add"}], "the function of `tool_calls[0]` of `messages[1]` is a string"),
        ([{"function": {}}], "the function's name in `tool_calls[0]` of `messages[1]` is null"),
        (
            [{"name": "add", "arguments": "a=1"}],
            "`arguments` of `tool_calls[0]` of `messages[1]` is",
        ),
        ([{"name": "add", "arguments": [1]}], "is a list; expected an object, or its JSON"),
    ],
)
def test_bad_calls(call: Any, said: str) -> None:
    assert said in refused(HI, {"role": "assistant", "tool_calls": call})


def test_only_the_assistant_calls_tools() -> None:
    assert "its role is user" in refused(HI | {"tool_calls": [CALL]}, YO)


def test_the_old_way_to_call_is_not_dropped() -> None:
    call = {"name": "add", "arguments": "{}"}
    said = refused(HI, {"role": "assistant", "content": "x", "function_call": call})
    assert said == "`messages[1]` has `function_call`; write it as `tool_calls`"


def test_reasoning_is_kept_for_the_template() -> None:
    found = answer(content="4", reasoning_content="2 and 2", thinking=None).messages[1]
    assert found.to_dict() == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert "`thinking` of `messages[0]` is a number" in refused(HI | {"thinking": 3}, YO)


# Weights


@pytest.mark.parametrize(("weight", "kept"), [(0, 0.0), (1, 1.0), (0.25, 0.25), (None, None)])
def test_weights(weight: Any, kept: Any) -> None:
    found = answer(content="Yo", weight=weight).messages[1]
    assert found.weight == kept
    assert "weight" not in found.to_dict()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (-1, "the weight of `messages[1]` is -1; expected 0 or more"),
        (float("nan"), "the weight of `messages[1]` is nan"),
        (float("inf"), "the weight of `messages[1]` is inf"),
        ("1", "the weight of `messages[1]` is a string; expected a number"),
        (True, "the weight of `messages[1]` is a boolean; expected a number"),
    ],
)
def test_bad_weights(weight: Any, said: str) -> None:
    assert said in refused(HI, YO | {"weight": weight})


def test_weights_are_the_assistants() -> None:
    assert chat(HI | {"weight": 0}, YO).messages[0].weight is None
    assert "only the assistant's turns are learnt" in refused(HI | {"weight": 1}, YO)


# ShareGPT


def test_the_roles_of_sharegpt() -> None:
    call = json.dumps({"name": "add", "arguments": ARGUMENTS})
    turns = [
        ("system", "Be."),
        ("human", "2+2?"),
        ("function_call", call),
        ("observation", "4"),
        ("gpt", "4"),
        ("user", "3+3?"),
        ("function_call", f"[{call}, {call}]"),
        ("tool", "6"),
        ("assistant", "6"),
    ]
    found = row(
        {"conversations": [{"from": a, "value": b} for a, b in turns], "tools": json.dumps(TOOLS)}
    )
    added = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
    assert found.messages == (
        Message("system", "Be."),
        Message("user", "2+2?"),
        Message("assistant", "", tool_calls=(added,)),
        Message("tool", "4"),
        Message("assistant", "4"),
        Message("user", "3+3?"),
        Message("assistant", "", tool_calls=(added, added)),
        Message("tool", "6"),
        Message("assistant", "6"),
    )
    assert found.tools == tuple(TOOLS)


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}


def test_the_system_prompt_of_sharegpt_may_stand_beside() -> None:
    found = row({"conversations": [HUMAN, GPT], "system": "Be."})
    assert found == chat({"role": "system", "content": "Be."}, HI, YO)
    for empty in ("", " ", None):
        assert row({"conversations": [HUMAN, GPT], "system": empty}) == chat(HI, YO)


def test_turns_of_openai_under_the_key_of_sharegpt() -> None:
    assert row({"conversations": [HI, YO | {"weight": 0.5}]}) == chat(HI, YO | {"weight": 0.5})


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([HUMAN], "a line without an answer: the last message is the user's"),
        ([], "a line without an answer: `conversations` is empty"),
        ([HUMAN, {"value": "Yo"}], "`conversations[1]` has no `from`"),
        ([HUMAN, {"from": "gpt"}], "`conversations[1]` has no `value`"),
        ([HUMAN, {"from": "bot", "value": "Yo"}], '`conversations[1]` has the unknown role "bot"'),
        ([HUMAN, {"from": ["gpt"], "value": "Yo"}], 'the unknown role ["gpt"]'),
        ([HUMAN, {"from": "gpt", "value": ""}], "the content of `conversations[1]` is empty"),
        ([HUMAN, {"from": "function_call", "value": "add(1)"}], "is text that is not JSON"),
        ([HUMAN, {"from": "function_call", "value": "[]"}], "calls nothing"),
        (["Hi"], "`conversations[0]` is a string; expected an object with `from` and `value`"),
    ],
)
def test_bad_sharegpt(turns: list[Any], said: str) -> None:
    assert said in refused(*turns, key="conversations")


def test_two_system_prompts() -> None:
    turns = [{"from": "system", "value": "Be."}, HUMAN, GPT]
    assert "`system` and a system turn" in refused(*turns, key="conversations", system="Be!")

"""Formats of rows: which one a row has, and what becomes of it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.data.formats import FORMATS, detect, make_row
from esft.data.row import Message, Row
from esft.errors import DataError, EsftError

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [HI, YO]},
    "prompt-completion": {"prompt": "2+2=", "completion": "4"},
    "alpaca": {"instruction": "Add.", "input": "2 2", "output": "4"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    },
    "text": {"text": "Once upon a time"},
    "tokenized": {"input_ids": [5, 6, 7]},
}


def row(value: dict[str, Any], format: Any = None) -> Row:
    return make_row(value, "f:1", format or detect(value, "f:1"))


def refused(value: dict[str, Any], format: Any = None) -> str:
    with pytest.raises(DataError) as caught:
        row(value, format)
    message = str(caught.value)
    assert message.startswith("f:1: ")
    return message.removeprefix("f:1: ")


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_detected(format: str) -> None:
    assert detect(ROWS[format], "f:1") == format
    more = {"id": 7, "source": "x", "prompt_id": "a", "label": None}
    assert detect(ROWS[format] | more, "f:1") == format


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_row_of_two_formats_is_refused_unless_one_is_named(first: str, second: str) -> None:
    if first == second:
        return
    both = ROWS[first] | ROWS[second]
    said = refused(both)
    assert "fits the formats" in said
    assert f"{first} (" in said
    assert f"{second} (" in said
    assert "data.format (--format)" in said
    assert row(both, first) == row(ROWS[first])
    # Columns of a table are null where a row does not have them.
    nulls = dict.fromkeys(ROWS[second]) | ROWS[first]
    assert detect(nulls, "f:1") == first


def test_a_prompt_beside_messages_is_no_second_format() -> None:
    assert detect({"prompt": "Hi", **ROWS["messages"]}, "f:1") == "messages"
    assert detect({"prompt": "Hi", **ROWS["text"]}, "f:1") == "text"


@pytest.mark.parametrize("format", FORMATS)
def test_a_named_format_must_fit(format: str) -> None:
    said = refused({"question": "Hi"}, format)
    assert said.startswith("no `")
    assert format in said


# Prompt and completion


def test_prompt_and_completion() -> None:
    assert row(ROWS["prompt-completion"]) == Row("f:1", prompt="2+2=", completion="4")


def test_prompt_and_completion_of_messages() -> None:
    system = {"role": "system", "content": "Be."}
    found = row({"prompt": [system, HI, YO, HI], "completion": [YO], "tools": TOOLS})
    said = [Message("system", "Be."), Message("user", "Hi"), Message("assistant", "Yo")]
    assert found.messages == (*said, *said[1:])
    assert found.given == 4
    assert found.tools == tuple(TOOLS)
    assert found.format == "messages"


@pytest.mark.parametrize(
    ("prompt", "completion", "said"),
    [
        ([HI], "Yo", "`prompt` is a list and `completion` is a string; expected two strings"),
        ("Hi", [YO], "`prompt` is a string and `completion` is a list; expected two strings"),
        ([HI], [], "a line without an answer: `completion` is empty"),
        ([HI], [HI], "a line without an answer: the last message is the user's"),
        ([{"role": "human"}], [YO], '`prompt[0]` has the unknown role "human"'),
        (None, "Yo", "no `prompt`"),
    ],
)
def test_bad_prompts_and_completions(prompt: Any, completion: Any, said: str) -> None:
    assert said in refused({"prompt": prompt, "completion": completion})


# Alpaca

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
2 2

### Response:
"""
WITHOUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
Add.

### Response:
"""


@pytest.mark.parametrize("given", [{"input": ""}, {"input": "  \n"}, {"input": None}, {}])
def test_alpaca_without_input(given: dict[str, Any]) -> None:
    found = row({"instruction": "Add.", "output": "4", **given})
    assert found == Row("f:1", prompt=WITHOUT, completion="4")


def test_alpaca_with_input() -> None:
    assert row(ROWS["alpaca"]) == Row("f:1", prompt=WITH_INPUT, completion="4")


def test_the_system_prompt_of_alpaca_takes_the_place_of_its_own() -> None:
    found = row(ROWS["alpaca"] | {"system": "You add."})
    assert (
        found.prompt == "You add.\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    )
    assert row(ROWS["alpaca"] | {"system": ""}) == row(ROWS["alpaca"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": ""}, "a line without an answer: `output` is empty"),
        ({"output": None}, "`output` is null"),
        ({"instruction": " "}, "`instruction` is empty"),
        ({"input": ["2"]}, "`input` is a list"),
        ({"system": 1}, "`system` is a number"),
        ({"history": [["Hi", "Yo"]]}, "`history` has earlier turns; write them as `messages`"),
    ],
)
def test_bad_alpaca(change: dict[str, Any], said: str) -> None:
    assert said in refused(ROWS["alpaca"] | change, "alpaca")


def test_an_instruction_without_output() -> None:
    assert refused({"instruction": "a"}) == "a line without an answer: no `output`"


# Plain text


def test_text() -> None:
    found = row({"text": "a\n b "})
    assert found == Row("f:1", text="a\n b ")
    assert found.format == "text"
    assert refused({"text": " "}) == "`text` is empty"
    assert refused({"text": ["a"]}) == "`text` is a list; expected a string"


def test_values_that_json_does_not_have() -> None:
    assert refused({"text": b"a"}) == "`text` is of type bytes; expected a string"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.floats(),
    st.sampled_from(
        ["", "a", "user", "assistant", "human", "gpt", "function_call", "[1]", "\ud800"]
    ),
)
# Objects that look like turns and calls, with anything in them.
INNER = (
    "role",
    "content",
    "from",
    "value",
    "weight",
    "tool_calls",
    "function",
    "name",
    "arguments",
)
OUTER = (*{key for row in ROWS.values() for key in row}, "tools", "system", "labels", "history")
MASKS = ("completion_mask", "assistant_masks", "attention_mask", "position_ids", "seq_lengths")
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(INNER), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    st.dictionaries(st.sampled_from((*OUTER, *MASKS)), ANYTHING, max_size=4),
    st.sampled_from(FORMATS),
    st.sampled_from([None, *FORMATS]),
)
def test_anything_is_a_row_or_named(value: dict[str, Any], base: str, named: Any) -> None:
    try:
        found = row(ROWS[base] | value, named)
        assert (
            found.messages or found.text or found.input_ids or (found.prompt and found.completion)
        )
        said = found.where
    except EsftError as error:
        said = str(error)
    assert said.startswith("f:1")

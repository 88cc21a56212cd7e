"""Reading JSONL: what is taken, and that every fault names its file and line."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.data.formats import FORMATS
from esft.data.row import Message, Row
from esft.data.rows import read_rows
from esft.data.sources import Source, read_source
from esft.errors import DataError, EsftError

GOOD = b'{"prompt": "2+2=", "completion": "4"}\n'
CHAT = (
    b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'
)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "task.jsonl"
    path.write_bytes(data)
    return path


def messages(*turns: object) -> bytes:
    return json.dumps({"messages": list(turns)}).encode() + b"\n"


def turn(role: object, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


USER, ANSWER = turn("user", "Hi"), turn("assistant", "Yo")


def test_prompt_and_completion(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert read_rows(path) == [Row(f"{path}:1", prompt="2+2=", completion="4")]
    assert read_rows(str(path))[0].format == "prompt-completion"


def test_messages(tmp_path: Path) -> None:
    path = write(tmp_path, CHAT)
    (row,) = read_rows(path)
    assert row == Row(f"{path}:1", messages=(Message("user", "Hi"), Message("assistant", "Yo")))
    assert row.format == "messages"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + GOOD + GOOD, id="byte-order mark"),
        pytest.param(GOOD.replace(b"\n", b"\r\n") * 2, id="CRLF"),
        pytest.param(b"\n" + GOOD + b"  \t\r\n" + GOOD + b"\n\n", id="blank lines"),
        pytest.param(GOOD + GOOD.rstrip(b"\n"), id="no newline at the end"),
        pytest.param(
            b'{"id": 7, ' + GOOD[1:] + b'{"tool_calls": [1], ' + GOOD[1:], id="extra keys"
        ),
    ],
)
def test_tolerated(tmp_path: Path, data: bytes) -> None:
    rows = read_rows(write(tmp_path, data))
    assert [(row.prompt, row.completion) for row in rows] == [("2+2=", "4")] * 2


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n" + GOOD + b"\n" + GOOD)
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:4"]


def test_line_separators_inside_a_string_do_not_split(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    line = json.dumps({"prompt": text, "completion": "4"}, ensure_ascii=False)
    (row,) = read_rows(write(tmp_path, line.encode()))
    assert row.prompt == text


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    text = "é" * 5_000_000
    (row,) = read_rows(write(tmp_path, json.dumps({"prompt": text, "completion": "4"}).encode()))
    assert row.prompt == text


def test_system_and_tool_turns_may_be_empty(tmp_path: Path) -> None:
    data = messages(turn("system", ""), USER, ANSWER, turn("tool", ""), ANSWER)
    (row,) = read_rows(write(tmp_path, data))
    assert [m.role for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_a_conversation_may_repeat_its_prompt(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, b'{"prompt": "Hi", ' + CHAT[1:]))
    assert row.format == "messages"


# Each bad line comes second, after a good one, so that the line number says something.
BAD = {
    "broken": (b'{"prompt": "a" "completion": "b"}\n', "not JSON"),
    "two objects": (GOOD.rstrip() + GOOD, "not JSON: Extra data"),
    "python": (b"{'prompt': 'a'}\n", "not JSON"),
    "cut in a string": (b'{"prompt": "a", "compl', "cut off"),
    "cut between": (b'{"prompt": "a",\n', "cut off"),
    "cut early": (b"{", "cut off"),
    "latin-1": ('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9"),
    "NUL": (b'{"prompt": "a\0", "completion": "b"}\n', "NUL"),
    "byte-order mark inside": (b"\xef\xbb\xbf" + GOOD, "not JSON"),
    "a list": (b"[1]\n", "a list, not an object"),
    "a string": (b'"a"\n', "a string, not an object"),
    "a number": (b"4\n", "a number, not an object"),
    "null": (b"null\n", "null, not an object"),
    "too deep": (b"[" * 200_000 + b"\n", "JSON"),
    "a number of 5,000 digits": (b'{"x": ' + b"1" * 5000 + b"}\n", "JSON"),
    "no keys": (
        b"{}\n",
        "found no keys; expected `messages`, `prompt` and `completion`, `instruction`",
    ),
    "other keys": (b'{"sentence": "a", "label": 1}\n', "found `sentence`, `label`; expected"),
    "no completion": (b'{"prompt": "a"}\n', "a line without an answer: no `completion`"),
    "no prompt": (b'{"completion": "a"}\n', "no `prompt`"),
    "empty completion": (b'{"prompt": "a", "completion": ""}\n', "a line without an answer"),
    "blank completion": (b'{"prompt": "a", "completion": " \\n"}\n', "a line without an answer"),
    "empty prompt": (b'{"prompt": "", "completion": "a"}\n', "`prompt` is empty"),
    "null completion": (b'{"prompt": "a", "completion": null}\n', "`completion` is null"),
    "number prompt": (b'{"prompt": 1, "completion": "a"}\n', "`prompt` is a number"),
    "list prompt": (b'{"prompt": [], "completion": "a"}\n', "`prompt` is a list"),
    "boolean prompt": (b'{"prompt": true, "completion": "a"}\n', "`prompt` is a boolean"),
    "half a surrogate pair": (
        b'{"prompt": "a\\ud800", "completion": "b"}\n',
        "half of a surrogate pair (\\ud800) at character 2",
    ),
}
BAD_CHAT = {
    "not a list": (b'{"messages": "Hi"}\n', "`messages` is a string"),
    "no turns": (messages(), "a line without an answer: `messages` is empty"),
    "not an object": (messages("Hi"), "`messages[0]` is a string"),
    "no role": (messages({"content": "Hi"}, ANSWER), "`messages[0]` has no `role`"),
    "no content": (messages(USER, {"role": "assistant"}), "`messages[1]` has no `content`"),
    "unknown role": (messages(turn("human", "Hi"), ANSWER), 'unknown role "human"'),
    "role of a wrong type": (messages(turn(["user"], "Hi"), ANSWER), 'unknown role ["user"]'),
    "content of a wrong type": (
        messages(turn("user", [{"type": "text"}]), ANSWER),
        "the content of `messages[0]` is a list",
    ),
    "no answer": (messages(USER), "a line without an answer: the last message is the user's"),
    "wrong order": (messages(ANSWER, USER), "a line without an answer"),
    "empty answer": (messages(USER, turn("assistant", "")), "a line without an answer"),
    "empty question": (messages(turn("user", ""), ANSWER), "the content of `messages[0]` is empty"),
    "tool calls": (
        messages(USER, turn("assistant", "x", tool_calls=[{}])),
        "the function's name in `tool_calls[0]` of `messages[1]` is null; expected a string",
    ),
    "both formats": (
        b'{"completion": "a", ' + CHAT[1:],
        "the row fits the formats messages (`messages`) and prompt-completion (`completion`)",
    ),
    "mixed formats": (GOOD, "a row with prompt-completion, but"),
}


@pytest.mark.parametrize(("first", "line", "said"), [
    *(pytest.param(GOOD, *case, id=name) for name, case in BAD.items()),
    *(pytest.param(CHAT, *case, id=f"chat: {name}") for name, case in BAD_CHAT.items()),
    pytest.param(GOOD, CHAT, "a row with messages, but", id="mixed formats"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, first: bytes, line: bytes, said: str) -> None:
    path = write(tmp_path, first + line)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    with pytest.raises(DataError, match="no rows in it") as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_utf_16_is_refused_at_the_first_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.decode().encode("utf-16"))
    with pytest.raises(DataError, match=r":1: .*UTF-16"):
        read_rows(path)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.jsonl"
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}: no such data file"


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files in this folder"):
        read_rows(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read_rows(path)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    line=st.sampled_from([GOOD, CHAT, messages(turn("system", "Be."), USER, ANSWER)]),
    place=st.integers(0, 200),
    dropped=st.integers(0, 20),
    added=st.binary(max_size=6),
)
def test_a_damaged_line_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, line: bytes, place: int, dropped: int, added: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), line[:place] + added + line[place + dropped :])
    try:
        said = read_rows(path)[0].where
    except EsftError as error:
        said = str(error)
    assert said.startswith(f"{path}:")


def test_the_examples_of_the_format_page_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    found = [read_source(Source(str(write(tmp_path, block.encode())))) for block in blocks]
    assert {source.format for source in found} == set(FORMATS)
    (alpaca,) = (source for source in found if source.format == "alpaca")
    assert f"```text\n{alpaca.rows[0].prompt}```" in page

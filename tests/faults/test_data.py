"""D1, D2, D4: data that cannot be used. Every fault is named as `file:line: reason`; with
`--skip-bad` a run goes on without the row and counts it."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from esft.errors import DataError
from esft.recipe_sections import DataSpec
from esft.run.task_data import TaskData, prepare
from tests.checkpoints import save_tiny
from tests.command import esft
from tests.notes import Notes
from tests.toy_tokenizers import CHATML, byte_tokenizer

GOOD = b'{"prompt": "2+2=", "completion": "4"}\n'
OTHER = b'{"prompt": "3+3=", "completion": "6"}\n'
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TOKENIZER = byte_tokenizer(
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    bos=None,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    template=CHATML,
)


def prepared(path: Path, skip_bad: int = 0, notes: Notes | None = None, **spec: Any) -> TaskData:
    data = DataSpec(train=str(path), skip_bad=skip_bad, packing=False, max_length=512, **spec)
    return prepare(data, TOKENIZER, reporter=notes or Notes())


def rows(data: TaskData) -> list[str]:
    """What the training set's rows say, in order."""
    return [TOKENIZER.decode(data.train_set[i]["input_ids"]) for i in range(len(data.train_set))]


def check_named_and_skipped(path: Path, line: int, reason: str, good: list[bytes]) -> None:
    """Check that a file with one bad line is refused by its name, and is one row poorer without.

    Args:
        path: of the file.
        line: number of the bad line.
        reason: part of what must be said.
        good: the file's other lines.
    """
    with pytest.raises(DataError) as caught:
        prepared(path)
    where, said = f"{path}:{line}", str(caught.value)
    assert said.startswith(f"{where}: ")
    assert reason in said
    assert "\n" not in said

    notes = Notes()
    data = prepared(path, 1, notes)
    clean = path.with_name("clean.jsonl")
    clean.write_bytes(b"".join(good))
    assert rows(data) == rows(prepared(clean))
    assert data.bad_rows.skipped == [{"where": where, "reason": said.removeprefix(f"{where}: ")}]
    assert "1 bad row skipped (--skip-bad 1)" in notes.notes

    twice = path.with_name("twice.jsonl")
    twice.write_bytes(path.read_bytes().removesuffix(b"\n") + b"\n" + b"{}\n")
    with pytest.raises(DataError, match=r"1 bad row skipped before this one, as many as --skip-ba"):
        prepared(twice, 1)
    assert len(prepared(twice, 2).bad_rows.skipped) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"prompt": "a" "completion": "b"}\n', "not JSON", id="bad JSON"),
        pytest.param(GOOD.rstrip() + GOOD, "not JSON: Extra data", id="two objects"),
        pytest.param(b"[1, 2]\n", "a list, not an object", id="no object"),
        pytest.param(
            b'{"prompt": "\xff", "completion": "b"}\n', "not UTF-8: byte 0xff", id="UTF-8"
        ),
        pytest.param(b'{"prompt": "a\0", "completion": "b"}\n', "a NUL byte", id="NUL"),
        pytest.param(b"\xef\xbb\xbf" + GOOD, "not JSON", id="BOM inside"),
        pytest.param(b'{"prompt": "a", "compl\n', "cut off?", id="truncated"),
    ],
)
def test_d1_a_bad_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + OTHER)
    check_named_and_skipped(path, 2, reason, [GOOD, OTHER])


def test_d1_a_file_that_ends_in_the_middle_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + OTHER + GOOD[:20])
    check_named_and_skipped(path, 3, "the line ends in the middle of a value", [GOOD, OTHER])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + GOOD + OTHER, id="BOM"),
        pytest.param((GOOD + OTHER).replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(b"\n" + GOOD + b" \t\r\n\n" + OTHER + b"\n", id="blank"),
    ],
)
def test_d1_what_does_not_matter(tmp_path: Path, data: bytes) -> None:
    path, clean = tmp_path / "a.jsonl", tmp_path / "clean.jsonl"
    path.write_bytes(data)
    clean.write_bytes(GOOD + OTHER)
    assert rows(prepared(path)) == rows(prepared(clean))
    assert prepared(path, 9).bad_rows.skipped == []


def test_d1_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    """It is read, in memory of a few times its size; too long for the model, it is counted."""
    path, notes = tmp_path / "a.jsonl", Notes()
    long = {"prompt": "2 + 2 = " * 1_250_000, "completion": "4"}
    path.write_bytes(GOOD + json.dumps(long).encode() + b"\n" + OTHER)
    start = time.monotonic()
    tracemalloc.start()
    try:
        from esft.data.rows import read_rows

        found = read_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[1].prompt == long["prompt"]
    assert peak < 60e6
    assert time.monotonic() - start < 20
    long["prompt"] = long["prompt"][:100_000]  # 10 MB take the tokenizer a minute
    path.write_bytes(GOOD + json.dumps(long).encode() + b"\n" + OTHER)
    data = prepared(path, 0, notes)
    assert data.train_set.rows == 2
    (said,) = (note for note in notes.notes if "left out" in note)
    assert said.startswith("1 of 3 rows left out")
    assert f"{path}:2" in said


def chat(*turns: Any) -> bytes:
    return json.dumps({"messages": list(turns)}).encode() + b"\n"


CHAT = chat(USER, ANSWER)


@pytest.mark.parametrize(
    ("good", "line", "reason"),
    [
        pytest.param(GOOD, b'{"prompt": "a"}\n', "no `completion`", id="missing answer"),
        pytest.param(GOOD, b'{"completion": "a"}\n', "no `prompt`", id="missing prompt"),
        pytest.param(GOOD, b'{"question": "a"}\n', "found `question`; expected", id="other keys"),
        pytest.param(GOOD, b'{"prompt": 1, "completion": "a"}\n', "is a number", id="type"),
        pytest.param(GOOD, b'{"prompt": "a", "completion": null}\n', "is null", id="null"),
        pytest.param(GOOD, b'{"prompt": "a", "completion": " "}\n', "is empty", id="empty answer"),
        pytest.param(GOOD, CHAT, "but {path}:1 has prompt-completion", id="mixed formats"),
        pytest.param(
            GOOD,
            b'{"text": "a", ' + GOOD[1:],
            "fits the formats prompt-completion (`completion`) and text (`text`)",
            id="two formats",
        ),
        pytest.param(CHAT, b'{"messages": []}\n', "`messages` is empty", id="no turns"),
        pytest.param(CHAT, chat({"content": "Hi"}, ANSWER), "has no `role`", id="missing role"),
        pytest.param(
            CHAT, chat({"role": "human", "content": "Hi"}, ANSWER), 'role "human"', id="role"
        ),
        pytest.param(
            CHAT, chat({"role": "user", "content": ["Hi"]}, ANSWER), "is a list", id="content"
        ),
        pytest.param(CHAT, chat(ANSWER, USER), "the last message is the user's", id="wrong order"),
        pytest.param(
            CHAT,
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
            "the function's name in `tool_calls[0]` of `messages[1]` is null",
            id="call",
        ),
    ],
)
def test_d2_a_row_that_says_something_else(
    tmp_path: Path, good: bytes, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + line + good)
    check_named_and_skipped(path, 2, reason.format(path=path), [good, good])


@pytest.mark.parametrize("data", [b"", b"\n \r\n\n"], ids=["empty", "blank"])
def test_d4_no_rows(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for skip_bad in (0, 9):
        with pytest.raises(DataError) as caught:
            prepared(path, skip_bad)
        assert str(caught.value).startswith(f"{path}: no rows in it; expected")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("count", "said"),
    [
        pytest.param(1, "the training set is 1 row, less than a step's 8", id="one row"),
        pytest.param(5, "the training set is 5 rows, less than a step's 8", id="less than a batch"),
    ],
)
def test_d4_little_data_trains(tmp_path: Path, base: Path, count: int, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(GOOD.replace(b"2+2", b"%d+2" % n) for n in range(count)))
    options = ["--steps", 2, "--lr", 1e-2, "--set", "data.packing=false"]
    result = esft("train", base, "--data", path, *options, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert said in result.stderr
    assert (tmp_path / "run" / "delta" / "esft_delta.safetensors").is_file()


@pytest.mark.parametrize("shared", [3, 40], ids=["overlap", "eval is train"])
def test_d4_test_rows_that_are_training_rows(tmp_path: Path, shared: int) -> None:
    train, test, notes = tmp_path / "train.jsonl", tmp_path / "test.jsonl", Notes()
    lines = [GOOD.replace(b"2+2", b"%d+2" % n) for n in range(77)]
    train.write_bytes(b"".join(lines[:40]))
    test.write_bytes(b"".join(lines[40 - shared : 80 - shared]))
    data = prepared(train, 0, notes, eval=str(test))
    assert len(data.eval.examples) == 40
    (said,) = (note for note in notes.notes if "data.eval" in note)
    assert re.match(rf"{shared} of 40 rows of data\.eval are in data\.train, too", said)
    if shared == 40:
        apart = Notes()
        test.write_bytes(b"".join(lines[40:]))
        prepared(train, 0, apart, eval=str(test))
        assert not any("data.eval" in note for note in apart.notes)

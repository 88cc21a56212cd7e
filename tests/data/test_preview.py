"""Rows shown as text again: nothing is lost, and what is learnt is what has a label."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esft.data.encode import encode_rows
from esft.data.example import IGNORED, Example
from esft.data.packing import TrainSet, pack, separate
from esft.data.preview import Segment, ShownRow, show_rows
from esft.data.row import Message, Row
from esft.errors import DataError
from tests.toy_tokenizers import CHATML, byte_tokenizer

CHAT = byte_tokenizer(
    ("<pad>", "<|im_start|>", "<|im_end|>"),
    bos=None,
    eos="<|im_end|>",
    pad="<pad>",
    template=CHATML,
)
PAIRS = byte_tokenizer()


def plain(row: ShownRow) -> list[tuple[str, bool, bool]]:
    return [(piece.text, piece.learnt, piece.special) for piece in row.segments]


def test_a_conversation() -> None:
    turns = (Message("user", "hi"), Message("assistant", "yo"))
    train_set = separate(encode_rows([Row("f:1", messages=turns)], CHAT), 100)
    (row,) = show_rows(train_set, CHAT, 1)
    assert plain(row) == [
        ("<|im_start|>", False, True),
        ("user\nhi", False, False),
        ("<|im_end|>", False, True),
        ("\n", False, False),
        ("<|im_start|>", False, True),
        ("assistant\n", False, False),
        ("yo", True, False),
        ("<|im_end|>", True, True),
        ("\n", False, False),
    ]
    assert row.marked() == (
        "{=<|im_start|>=}user\nhi{=<|im_end|>=}\n{=<|im_start|>=}assistant\n{+yo{=<|im_end|>=}+}\n"
    )
    assert (row.where, row.learnt) == ("f:1", len("yo") + 1)


def rows_of(*texts: tuple[str, str]) -> list[Row]:
    return [Row(f"f:{n}", prompt=a, completion=b) for n, (a, b) in enumerate(texts, start=1)]


def test_blocks_show_the_rows_that_are_in_them() -> None:
    examples = encode_rows(rows_of(("a", "bc"), ("de", "f"), ("g", "hij")), PAIRS)
    apart = show_rows(separate(examples, 12), PAIRS, 9)
    together = pack(examples, 12, pad_id=0)
    assert len(together) == 2  # blocks
    assert show_rows(together, PAIRS, 9) == apart
    assert [row.marked() for row in apart] == [
        "{=<s>=}a{+bc{=</s>=}+}",
        "{=<s>=}de{+f{=</s>=}+}",
        "{=<s>=}g{+hij{=</s>=}+}",
    ]


def test_weights() -> None:
    ids = PAIRS("abcd", add_special_tokens=False)["input_ids"]
    example = Example(ids, [False, True, True, True], "f:1", [1.0, 1.0, 0.5, 0.0])
    (row,) = show_rows(separate([example], 9), PAIRS, 1)
    assert row.weights == [1.0, 1.0, 0.5, 0.0]
    assert row.segments == [
        Segment("a", False, False, 1.0),
        Segment("b", True, False, 1.0),
        Segment("c", True, False, 0.5),
        Segment("d", False, False, 1.0),
    ]
    assert row.marked() == "a{+b+}{+x0.5:c+}d"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    (row,) = show_rows(
        separate(encode_rows(rows_of(("\x1b[31m\r\x00é😀\t\u202e", "x\x7f\u2028\n")), PAIRS), 99),
        PAIRS,
        1,
    )
    text = "".join(piece.text for piece in row.segments)
    assert text == "<s>\\x1b[31m\\r\\x00é😀\t\\u202ex\\x7f\\u2028\n</s>"


def test_a_letter_parted_by_the_mask() -> None:
    ids = PAIRS("é", add_special_tokens=False)["input_ids"]
    (row,) = show_rows(separate([Example(ids, [False, True], "f:1")], 9), PAIRS, 1)
    assert plain(row) == [("\ufffd", False, False), ("\ufffd", True, False)]


def test_a_tokenizer_that_drops_a_space_at_the_start() -> None:
    words = ["<unk>", "▁one", "▁two", "▁three"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    example = Example([1, 2, 3], [False, True, False], "f:1")
    (row,) = show_rows(separate([example], 9), tokenizer, 1)
    assert [piece.text for piece in row.segments] == ["one", " two", " three"]


MARK = re.compile(r"\{\+(?:x([\d.e+-]+):)?|\+\}|\{=|=\}")


def read_marked(text: str) -> tuple[str, list[tuple[bool, bool, float]]]:
    """Read `marked` back: the text, and of each letter whether learnt, whether special, weight."""
    letters, flags = "", []
    learnt, special, weight, place = False, False, 1.0, 0
    while place < len(text):
        if mark := MARK.match(text, place):
            place = mark.end()
            if mark[0].startswith("{+"):
                learnt, weight = True, float(mark[1] or 1)
            elif mark[0] == "+}":
                learnt, weight = False, 1.0
            else:
                special = mark[0] == "{="
            continue
        if text[place] == "\\" and re.match(r"[+=]|\}", text[place + 1 :]) and place:
            place += 1
            continue
        letters += text[place]
        flags.append((learnt, special, weight))
        place += 1
    return letters, flags


tokens = st.tuples(st.sampled_from("ab{+=}"), st.booleans(), st.sampled_from([0.5, 1.0, 2.0]))


@given(st.lists(tokens, min_size=1, max_size=12))
@settings(deadline=None, derandomize=True)
def test_marks_say_what_labels_say(row: list[tuple[str, bool, float]]) -> None:
    ids = [PAIRS(letter, add_special_tokens=False)["input_ids"][0] for letter, *_ in row]
    labels = [token if learnt else IGNORED for token, (_, learnt, _) in zip(ids, row, strict=True)]
    weights = [weight if learnt else 0.0 for _, learnt, weight in row]
    item: dict[str, Any] = {"input_ids": ids, "labels": labels, "loss_weights": weights}
    train_set = TrainSet([item], [["f:1"]], packed=False, tokens=len(ids))
    (shown,) = show_rows(train_set, PAIRS, 1)
    letters = "".join(letter for letter, *_ in row)
    assert "".join(piece.text for piece in shown.segments) == letters
    flags = [(piece.learnt, piece.weight) for piece in shown.segments for _ in piece.text]
    assert flags == [(learnt, weight if learnt else 1.0) for _, learnt, weight in row]
    if not re.search(r"[{+=}]", letters):  # else a mark may begin with a letter of the text
        assert read_marked(shown.marked()) == (
            letters,
            [(learnt, False, weight if learnt else 1.0) for _, learnt, weight in row],
        )


@pytest.mark.parametrize("text", ["{+a+}", "{=a=}", "+}", "{{++}}", "{+=}"])
def test_marks_in_the_text_are_no_marks(text: str) -> None:
    (row,) = show_rows(separate(encode_rows(rows_of((text, text)), PAIRS), 99), PAIRS, 1)
    inner = row.marked().removeprefix("{=<s>=}").removesuffix("{=</s>=}+}")
    assert len(MARK.findall(inner)) == 1  # the one that begins the answer
    assert inner.replace("\\", "") == f"{text}{{+{text}"


def test_which_rows() -> None:
    train_set = separate(encode_rows(rows_of(*((f"{n}", "x") for n in range(50))), PAIRS), 9)

    def drawn(count: int, seed: int | None) -> list[int]:
        return [int(row.where[2:]) for row in show_rows(train_set, PAIRS, count, seed=seed)]

    assert drawn(3, None) == [1, 2, 3]
    assert drawn(0, None) == drawn(0, 1) == []
    assert drawn(99, None) == drawn(99, 5) == list(range(1, 51))
    assert drawn(5, 1) == drawn(5, 1) == sorted(set(drawn(5, 1)))
    assert len({tuple(drawn(5, seed)) for seed in range(5)}) == 5
    with pytest.raises(DataError, match="--rows -1: expected 0 or more"):
        drawn(-1, None)

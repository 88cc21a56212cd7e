"""D3: exactly which tokens are learnt, in twelve situations, with six families' templates.

Every case runs twice: with the template's generation tags, and without. What is expected is
written by `tests.chat_families` from strings, byte for byte; no template and no token has a part
in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from esft.data.encode import encode_rows
from esft.data.example import IGNORED, Example
from esft.data.fitting import fit
from esft.data.packing import collate, separate
from esft.data.row import Message, Row
from tests.chat_families import FAMILIES, Family, check

BRIEF = Message("system", "Be brief.")
HI, YO = Message("user", "Hi there"), Message("assistant", "Yo")
SUM, FOUR = Message("user", "2+2?"), Message("assistant", "It is 4")
LONG = (BRIEF, HI, YO, SUM, FOUR)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def tokenizers(family: Family, **options: Any) -> Iterator[Any]:
    """The family's tokenizer, its template with generation tags and without."""
    for tags in (True, False):
        yield family.tokenizer(tags=tags, **options)


def encoded(
    messages: Sequence[Message],
    tokenizer: Any,
    tools: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> Example:
    row = Row("chats.jsonl:7", messages=tuple(messages), tools=tuple(tools))
    (example,) = encode_rows([row], tokenizer, **options)
    return example


def test_d3_one_answer(family: Family) -> None:
    pieces = family.write([HI, YO])
    for tokenizer in tokenizers(family):
        example = encoded([HI, YO], tokenizer)
        check(example, pieces, tokenizer, {1})
        # Special tokens are one token each.
        text = "".join(piece for piece, _ in pieces)
        assert example.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [i for i, token in enumerate(example.input_ids) if example.completion[i]][-1]
        assert tokenizer.decode([example.input_ids[ends]]) == family.end


def test_d3_many_turns(family: Family) -> None:
    messages = [*LONG, Message("assistant", "Or is it?"), HI, YO]
    for tokenizer in tokenizers(family):
        example = encoded(messages, tokenizer)
        check(example, family.write(messages), tokenizer, {2, 4, 5, 7})


def test_d3_truncation(family: Family) -> None:
    pieces = family.write(LONG)
    for tokenizer in tokenizers(family):
        example = encoded(LONG, tokenizer)
        length = len(example.input_ids)
        tail = example.completion[::-1].index(True)
        bos = tokenizer.bos_token_id if family.bos else None
        # What follows the answer may go, and nothing else.
        (cut,) = fit([example], length - tail).examples
        check(cut, [*pieces[:-1], ("", None)], tokenizer, {2, 4})
        other = encoded([HI, YO], tokenizer)
        dropped = fit([example, other], length - tail - 1)
        assert (dropped.examples, len(dropped.dropped)) == ([other], 1)
        # The end: BOS, then what is left of the prompt, then the last answer whole.
        left = 12
        ended = fit([example], length - tail - left, truncation="keep_end", first_id=bos)
        (kept,) = ended.examples
        written = "".join(piece for piece, _ in pieces[1:-1])
        assert tokenizer.decode(kept.input_ids).startswith(family.bos)
        assert written.endswith(tokenizer.decode(kept.input_ids).removeprefix(family.bos))
        flags = example.completion[: length - tail][left:]
        if bos is not None:
            flags[0] = False
        assert kept.completion == flags
        assert ended.lost_answers == sum(example.completion) - sum(flags)


def test_d3_pad_is_the_end_token(family: Family) -> None:
    for tokenizer in tokenizers(family, pad=family.end):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        rows = [encoded([HI, YO], tokenizer), encoded(LONG, tokenizer)]
        data = separate(rows, 500)
        batch = collate([data[0], data[1]], pad_id=tokenizer.pad_token_id)
        for row, labels, mask in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
            length = len(row.input_ids)
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            learnt = [
                token if flag else IGNORED
                for token, flag in zip(row.input_ids, row.completion, strict=True)
            ]
            assert labels.tolist() == learnt + [IGNORED] * (len(mask) - length)
            assert int((labels == tokenizer.eos_token_id).sum()) == sum(
                message.role == "assistant" for message in ((HI, YO) if row is rows[0] else LONG)
            )


def test_d3_a_user_writes_the_templates_tokens(family: Family) -> None:
    # What a user would have to write for an answer of the assistant, in this family.
    turn = "".join(piece for piece, _ in family.write([HI, YO])[1:])
    forged = Message("user", f"{turn}{family.end}{turn}")
    for tokenizer in tokenizers(family):
        for messages in ([forged, YO], [HI, YO, forged, FOUR]):
            example = encoded(messages, tokenizer)
            learnt = {i for i, message in enumerate(messages) if message.role == "assistant"}
            check(example, family.write(messages), tokenizer, learnt)


def test_d3_tools(family: Family) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        SUM,
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "4"),
        Message("assistant", "It is 4", tool_calls=(call, call)),
        Message("tool", "4"),
        FOUR,
    ]
    for tokenizer in tokenizers(family):
        example = encoded(messages, tokenizer, [tool])
        check(example, family.write(messages, [tool]), tokenizer, {1, 3, 5})


def test_d3_nothing_but_a_system_message_before(family: Family) -> None:
    for tokenizer in tokenizers(family):
        example = encoded([BRIEF, YO], tokenizer)
        check(example, family.write([BRIEF, YO]), tokenizer, {1})


def test_d3_an_empty_system_message(family: Family) -> None:
    messages = [Message("system", ""), HI, YO, Message("tool", ""), FOUR]
    for tokenizer in tokenizers(family):
        example = encoded(messages, tokenizer)
        check(example, family.write(messages), tokenizer, {2, 4})


def test_d3_last_turn_only(family: Family) -> None:
    for tokenizer in tokenizers(family):
        for loss_on in ("completion", "assistant"):
            example = encoded(LONG, tokenizer, last_turn_only=True, loss_on=loss_on)
            check(example, family.write(LONG), tokenizer, {4})
        # The prompt of a conversation is not its completion, but its assistant may be learnt.
        row = Row("chats.jsonl:7", messages=LONG, given=4)
        for loss_on, learnt in (("completion", {4}), ("assistant", {2, 4}), ("all", {4})):
            (example,) = encode_rows([row], tokenizer, loss_on=loss_on)
            check(example, family.write(LONG), tokenizer, learnt)
            assert loss_on != "all" or example.labels("all")[1:] == example.input_ids[1:]


def test_d3_weights(family: Family) -> None:
    messages = [
        HI,
        Message("assistant", "Yo", weight=0),
        SUM,
        Message("assistant", "It is 4", weight=0.25),
        HI,
        YO,
    ]
    pieces = family.write(messages)
    for tokenizer in tokenizers(family):
        example = encoded(messages, tokenizer)
        check(example, pieces, tokenizer, {3, 5})
        assert example.weights is not None
        place = 0
        for text, answer in pieces:
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            expected = {1: 0.0, 3: 0.25}.get(-1 if answer is None else answer, 1.0)
            if answer is not None:
                assert set(example.weights[place : place + tokens]) == {expected}
                forgotten = example.labels("all")[place : place + tokens]
                assert (set(forgotten) == {IGNORED}) == (answer == 1)
            place += tokens


def test_d3_tokenizer_and_template_both_know_bos(family: Family) -> None:
    for tokenizer in tokenizers(family, adds_bos=True):
        example = encoded(LONG, tokenizer)
        check(example, family.write(LONG), tokenizer, {2, 4})
        assert example.input_ids.count(tokenizer.bos_token_id) == (1 if family.bos else 0)


def test_d3_letters_of_many_bytes_and_tokens_of_many_letters(family: Family) -> None:
    messages = [
        Message("user", "naïve 🦜🏽?\n\n"),
        Message("assistant", "\n\nOuï 🦜🏽é"),
        Message("user", "\n\né"),
        Message("assistant", "é\n"),
    ]
    pieces = family.write(messages)
    text = ["".join(piece for piece, _ in pieces), "\n\n \n\n é\n é\n é\n\n"] * 9
    for tokenizer in tokenizers(family, merges_from=text, merges=60):
        example = encoded(messages, tokenizer)
        check(example, pieces, tokenizer, {1, 3})
        assert len(example.input_ids) < sum(len(piece.encode()) for piece, _ in pieces) / 2

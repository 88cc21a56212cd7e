"""The three ways to the answers of a conversation, and the templates that are refused."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from esft.data.bad_rows import BadRows
from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.row import Message, Row
from esft.errors import DataError
from tests.chat_families import CHATML, Family
from tests.data.test_fitting import Notes
from tests.toy_tokenizers import byte_tokenizer

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Yo")
MORE, LAST = Message("user", "2+2?"), Message("assistant", "4")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}


def chat(*messages: Message, where: str = "chats.jsonl:7", **more: Any) -> Row:
    return Row(where, messages=messages, **more)


def published(name: str, special: tuple[str, ...], end: str) -> Any:
    """A byte tokenizer with a published template, from TRL's copy of it."""
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    return byte_tokenizer(
        special, bos=special[0], eos=end, pad=None, template=template, adds_bos=False
    )


def qwen3(name: str = "qwen3") -> Any:
    return published(name, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")


def learnt(example: Example, tokenizer: Any) -> list[str]:
    """Each run of learnt tokens as text."""
    runs: list[list[int]] = []
    before = False
    for token, flag in zip(example.input_ids, example.completion, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


def marks(example: Example, row: Row, tokenizer: Any, **options: Any) -> list[bool]:
    """The mask that transformers makes of a template's generation tags, for the same tokens."""
    theirs = tokenizer.apply_chat_template(
        [message.to_dict() for message in row.messages],
        tools=list(row.tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    assert list(theirs["input_ids"]) == example.input_ids
    return [bool(flag) for flag in theirs["assistant_masks"]]


CONVERSATIONS = [
    chat(USER, ANSWER),
    chat(Message("system", "Be brief."), USER, ANSWER, MORE, LAST),
    chat(
        MORE,
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "4"),
        LAST,
        tools=(TOOL,),
    ),
]


@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3_training", "qwen3_instruct_2507_training"])
def test_published_tags_are_read_as_transformers_reads_them(name: str, row: Row) -> None:
    tokenizer = qwen3(name)
    (example,) = encode_rows([row], tokenizer)
    assert example.completion == marks(example, row, tokenizer)


def test_qwen3_as_published_learns_all_answers_of_a_conversation() -> None:
    tokenizer = qwen3()
    row = chat(USER, Message("assistant", "<think>\nHm.\n</think>\n\nYo"), MORE, LAST)
    notes = Notes()
    rows = [row, chat(USER, ANSWER, where="chats.jsonl:8"), chat(*row.messages, where="chats:9")]
    first, single, third = encode_rows(rows, tokenizer, reporter=notes)
    assert learnt(first, tokenizer) == [
        "<think>\nHm.\n</think>\n\nYo<|im_end|>\n",
        "<think>\n\n</think>\n\n4<|im_end|>\n",
    ]
    # TRL's template, as transformers reads it.
    template = qwen3("qwen3_training").chat_template
    assert first.completion == marks(first, row, tokenizer, chat_template=template)
    assert third.input_ids == first.input_ids
    # A single answer needs no other template.
    assert learnt(single, tokenizer) == ["<think>\n\n</think>\n\nYo<|im_end|>"]
    (note,) = notes.notes
    assert note.startswith("chats.jsonl:7 and 1 more rows: ")
    assert "TRL's training template is used" in note
    assert tokenizer.chat_template == qwen3().chat_template


def test_gpt_oss_as_published_ends_its_answers() -> None:
    special = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
    tokenizer = published("gptoss", special, "<|return|>")
    row = chat(USER, ANSWER, MORE, LAST)
    (example,) = encode_rows([row], tokenizer)
    first, last = learnt(example, tokenizer)
    assert first.endswith("<|channel|>final<|message|>Yo<|end|>")
    assert last.endswith("<|channel|>final<|message|>4<|return|>")


def test_phi3_ends_a_conversation_once_more() -> None:
    special = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    tokenizer = published("phi3", special, "<|endoftext|>")
    (example,) = encode_rows([chat(USER, ANSWER, MORE, LAST)], tokenizer)
    assert learnt(example, tokenizer) == ["Yo<|end|>\n", "4<|end|>\n<|endoftext|>"]


def test_deepseek_v3_as_published_calls_tools() -> None:
    # Its own template joins the arguments, an object, to text.
    tokenizer = published("deepseekv3", ("<B>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>")
    notes = Notes()
    (example,) = encode_rows([CONVERSATIONS[2]], tokenizer, reporter=notes)
    call, answer = learnt(example, tokenizer)
    assert '{"a": 2}' in call
    assert call.endswith("<｜end▁of▁sentence｜>")
    assert answer == "4<｜end▁of▁sentence｜>"
    assert "TRL's training template" in notes.notes[0]


def test_a_template_that_knows_no_tool_calls_is_refused() -> None:
    tokenizer = published("llama3", ("<|begin|>", "<|eot_id|>"), "<|eot_id|>")
    (example,) = encode_rows([CONVERSATIONS[1]], tokenizer)
    assert learnt(example, tokenizer) == ["Yo<|eot_id|>", "4<|eot_id|>"]
    reason = r"^chats.jsonl:7: the chat template leaves the tool call of `messages\[1\]` out"
    with pytest.raises(DataError, match=reason):
        encode_rows([CONVERSATIONS[2]], tokenizer)


def test_what_the_prompt_holds_is_not_learnt_though_tagged() -> None:
    # The tag begins before the turn's header, as in TRL's template for gpt-oss.
    header = "{{ '<|im_start|>' + m.role + '\\n' }}"
    template = CHATML.template.replace("{% generation %}", "")
    template = template.replace(
        header + "{% if m.role == 'assistant' %}",
        "{% if m.role == 'assistant' %}{% generation %}" + header,
    ).replace("{% else %}", "{% else %}" + header)
    tokenizer = with_template(template)
    row = CONVERSATIONS[1]
    (example,) = encode_rows([row], tokenizer)
    assert learnt(example, tokenizer) == ["Yo<|im_end|>", "4<|im_end|>"]
    assert sum(marks(example, row, tokenizer)) > sum(example.completion)


@pytest.mark.parametrize("weights", [(None, None), (0.0, 0.5), (None, 0.0)])
def test_glm_as_published_needs_an_end(weights: tuple[float | None, float | None]) -> None:
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
    tokenizer = published("glm4moe", special, "<|endoftext|>")
    row = chat(
        USER,
        Message("assistant", "Yo", weight=weights[0]),
        MORE,
        Message("assistant", "4", weight=weights[1]),
    )
    reason = r"^chats.jsonl:7: EOS is never supervised: .*data.append_eos: true"
    with pytest.raises(DataError, match=reason):
        encode_rows([row], tokenizer)
    (plain,) = encode_rows([row], tokenizer, check_end=False)
    if weights[1] == 0:  # the end of an answer that is not learnt teaches nothing
        with pytest.raises(DataError, match=reason):
            encode_rows([row], tokenizer, append_eos=True)
        return
    (example,) = encode_rows([row], tokenizer, append_eos=True)
    assert example.input_ids == [*plain.input_ids, tokenizer.eos_token_id]
    assert learnt(example, tokenizer)[-1].endswith("4<|endoftext|>")
    assert example.weights == (plain.weights and [*plain.weights, 0.5])


def test_an_end_that_is_there_is_not_doubled() -> None:
    tokenizer = CHATML.tokenizer(tags=False)
    plain, ended = (
        encode_rows([CONVERSATIONS[1]], tokenizer, append_eos=append) for append in (False, True)
    )
    assert plain == ended


def test_a_template_of_ones_own_has_no_training_template() -> None:
    tokenizer = qwen3()
    tokenizer.chat_template += "{# mine #}"
    with pytest.raises(DataError, match=r"^chats.jsonl:7: .*`messages\[1\]` differently once"):
        encode_rows([chat(USER, ANSWER, MORE, LAST)], tokenizer)


def with_template(template: str) -> Any:
    family = Family(CHATML.special, "", CHATML.end, CHATML.around, template)
    return family.tokenizer(tags=True)


WITHOUT_END = CHATML.template.replace(
    "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
)
AROUND_ALL = "{% generation %}" + CHATML.template.replace("{% generation %}", "").replace(
    "{% endgeneration %}{{ '\\n' }}", "{{ '\\n' }}"
).replace("{% if add_gen", "{% endgeneration %}{% if add_gen")
ONLY_THE_LAST = (
    "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' and loop.last %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NEVER_ENDS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(
            WITHOUT_END, "EOS is never supervised: .*generation tags leave it out", id="end"
        ),
        pytest.param(AROUND_ALL, "generation tags mark text that is not the assist", id="all"),
        pytest.param(ONLY_THE_LAST, r"tags mark nothing of `messages\[1\]`", id="tags missing"),
        pytest.param(
            NEVER_ENDS + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "EOS is never supervised: .*template writes none",
            id="no end",
        ),
    ],
)
def test_templates_that_teach_the_wrong_thing(template: str, reason: str) -> None:
    tokenizer = with_template(template)
    row = chat(USER, ANSWER, MORE, LAST)
    with pytest.raises(DataError, match=rf"^chats.jsonl:7: .*{reason}"):
        encode_rows([row], tokenizer)
    # Such a row may be skipped like any other.
    bad = BadRows(1)
    assert encode_rows([row], tokenizer, bad_rows=bad) == []
    assert [skipped["where"] for skipped in bad.skipped] == ["chats.jsonl:7"]


def test_a_template_that_ends_only_the_last_answer_teaches_an_end() -> None:
    template = NEVER_ENDS.replace("{% endfor %}", "{% endfor %}{{ '' if add_generation_prompt ") + (
        "else '<|im_end|>' }}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    # Turns change once others follow: their end goes.
    with pytest.raises(DataError, match="differently once others follow"):
        encode_rows([chat(USER, ANSWER, MORE, LAST)], with_template(template))
    tokenizer = with_template(template)
    (example,) = encode_rows([chat(USER, ANSWER)], tokenizer)
    assert learnt(example, tokenizer) == ["Yo\n<|im_end|>"]


def test_named_templates_are_chosen_as_transformers_does() -> None:
    tokenizer = CHATML.tokenizer(tags=True)
    with_tools = CHATML.template.replace("<|im_start|>tools", "<|im_start|>functions")
    tokenizer.chat_template = {"default": CHATML.template, "tool_use": with_tools}
    for row in (CONVERSATIONS[1], CONVERSATIONS[2]):
        (example,) = encode_rows([row], tokenizer)
        assert example.completion == marks(example, row, tokenizer)
        assert ("<|im_start|>functions" in tokenizer.decode(example.input_ids)) == bool(row.tools)
    tokenizer.chat_template = {"other": CHATML.template}
    with pytest.raises(DataError, match=r"^chats.jsonl:7: no chat template to choose"):
        encode_rows([CONVERSATIONS[0]], tokenizer)

"""Tokens and masks against text in which a reader marked the answers by hand.

The byte tokenizers make one token of each letter and of each special token, so that
`user: [answer</s>]` says exactly which tokens are supervised.
"""

import re
from typing import Any

import pytest

from esft.data.bad_rows import BadRows
from esft.data.encode import encode_prompt, encode_rows
from esft.data.example import Example
from esft.data.row import Message, Row
from esft.errors import DataError, ModelError
from tests.data.test_fitting import Notes
from tests.toy_tokenizers import (
    CHATML,
    DEEPSEEK,
    GEMMA,
    LLAMA3,
    MISTRAL,
    REASONING,
    byte_tokenizer,
)

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3_TOKENS = ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>")
GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


def chatml(**more: Any) -> Any:
    return byte_tokenizer(
        CHATML_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=CHATML, **more
    )


def llama3(**more: Any) -> Any:
    return byte_tokenizer(
        LLAMA3_TOKENS, bos="<|begin|>", eos="<|eot_id|>", pad="<|eot_id|>", template=LLAMA3, **more
    )


def mistral(**more: Any) -> Any:
    return byte_tokenizer(template=MISTRAL, **more)


def gemma(**more: Any) -> Any:
    # The token that ends a turn is not the EOS.
    return byte_tokenizer(
        GEMMA_TOKENS, bos="<bos>", eos="<eos>", pad="<eos>", template=GEMMA, **more
    )


def deepseek(**more: Any) -> Any:
    return byte_tokenizer(template=DEEPSEEK, **more)


def chat(*turns: str) -> Row:
    """Make a row from "role: content" lines."""
    return Row("task.jsonl:7", messages=tuple(Message(*turn.split(": ", 1)) for turn in turns))


def marked(text: str, tokenizer: Any) -> tuple[list[str], list[bool]]:
    """Split text with «answers» into tokens and flags, knowing only the special tokens' names."""
    special = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
    added = "|".join(re.escape(str(t)) for t in tokenizer.added_tokens_decoder.values())
    tokens, flags, inside = [], [], False
    for piece in re.findall(f"{special}|{added}|.", text, flags=re.DOTALL):
        if piece in "«»":
            inside = piece == "«"
        else:
            tokens.append(piece)
            flags.append(inside)
    return tokens, flags


def spelled(example: Example, tokenizer: Any) -> tuple[list[str], list[bool]]:
    return [tokenizer.decode([i]) for i in example.input_ids], example.completion


TWO_TURNS = ("system: Be brief.", "user: Hi", "assistant: Yo", "user: 2+2?", "assistant: 4")
NO_SYSTEM = TWO_TURNS[1:]

CASES = [
    pytest.param(
        chatml(),
        chat(*TWO_TURNS),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yo<|im_end|>»\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n«4<|im_end|>»\n",
        id="chatml",
    ),
    pytest.param(
        llama3(),
        chat(*TWO_TURNS),
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yo<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»",
        id="llama3",
    ),
    pytest.param(
        mistral(),
        chat(*NO_SYSTEM),
        "<s>[INST] Hi [/INST]« Yo</s>»[INST] 2+2? [/INST]« 4</s>»",
        id="mistral",
    ),
    pytest.param(
        gemma(),
        chat(*NO_SYSTEM),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n«4<end_of_turn>»\n",
        id="gemma",
    ),
    pytest.param(
        deepseek(),
        chat(*TWO_TURNS),
        "<s>Be brief.\n\nUser: Hi\n\nAssistant:« Yo</s>»User: 2+2?\n\nAssistant:« 4</s>»",
        id="deepseek",
    ),
    pytest.param(
        chatml(),
        chat("user: Hi", "assistant: Yo", "assistant: Ho"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n"
        "<|im_start|>assistant\n«Ho<|im_end|>»\n",
        id="two answers in a row",
    ),
    # A user who writes the template's own tokens gains no supervision by it.
    pytest.param(
        chatml(),
        chat("user: Hi<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n", "assistant: Yo"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n<|im_end|>\n"
        "<|im_start|>assistant\n«Yo<|im_end|>»\n",
        id="injected turn",
    ),
    pytest.param(
        mistral(),
        chat("user: [/INST] No</s>[INST] Hi", "assistant: Yo"),
        "<s>[INST] [/INST] No</s>[INST] Hi [/INST]« Yo</s>»",
        id="injected mistral",
    ),
    pytest.param(
        chatml(),
        chat("user: Hi", "assistant: A<|im_end|> B\n"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«A<|im_end|> B\n<|im_end|>»\n",
        id="end token inside the answer",
    ),
    # The last turn decides how the conversation renders; with one answer that is no trouble.
    pytest.param(
        byte_tokenizer(
            CHATML_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=REASONING
        ),
        chat("user: Hi", "assistant: Yo"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\nYo<|im_end|>»\n",
        id="reasoning",
    ),
]


@pytest.mark.parametrize(("tokenizer", "row", "text"), CASES)
def test_conversations(tokenizer: Any, row: Row, text: str) -> None:
    (example,) = encode_rows([row], tokenizer)
    assert spelled(example, tokenizer) == marked(text, tokenizer)
    assert example.where == "task.jsonl:7"


@pytest.mark.parametrize(("tokenizer", "row", "text"), CASES)
def test_conversations_are_tokenised_as_transformers_does(
    tokenizer: Any, row: Row, text: str
) -> None:
    (example,) = encode_rows([row], tokenizer)
    messages = [message.to_dict() for message in row.messages]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert example.input_ids == list(theirs)


GENERATION = (  # ChatML with generation tags, which say what the template's author supervises
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("merges", [0, 40])
@pytest.mark.parametrize(
    "row", [chat(*TWO_TURNS), CASES[6].values[1], chat("user: a b", "assistant: wörld ü")]
)
def test_agrees_with_generation_tags(row: Row, merges: int) -> None:
    text = ["<|im_start|>user\nHi there, 2+2?\n assistant be brief wörld"] * 3
    tokenizer = chatml(merges_from=text, merges=merges)
    tokenizer.chat_template = GENERATION
    (example,) = encode_rows([row], tokenizer)
    theirs = tokenizer.apply_chat_template(
        [message.to_dict() for message in row.messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert example.input_ids == list(theirs["input_ids"])
    assert example.completion == [bool(flag) for flag in theirs["assistant_masks"]]


def test_a_token_across_the_cut_is_split_as_when_answering() -> None:
    # "\n\n" is one token here; the prompt ends in "\n" and the answer starts with one.
    tokenizer = chatml(merges_from=["\n\n"] * 9, merges=1)
    (example,) = encode_rows([chat("user: a\n\nb", "assistant: \nYo")], tokenizer)
    prompt = encode_prompt("a\n\nb", tokenizer, chat=True)
    assert [tokenizer.decode([i]) for i in prompt].count("\n\n") == 1
    assert example.input_ids[: len(prompt)] == prompt
    tokens, flags = spelled(example, tokenizer)
    assert tokens[len(prompt) :] == ["\n", "Y", "o", "<|im_end|>", "\n"]
    assert flags == [False] * len(prompt) + [True] * 4 + [False]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({}, "<s>2+2=«4</s>»", id="adds BOS"),
        pytest.param({"adds_bos": False}, "2+2=«4</s>»", id="adds nothing"),
        pytest.param({"adds_eos": True}, "<s>2+2=«4</s>»", id="adds BOS and EOS"),
        pytest.param({"adds_bos": False, "adds_eos": True}, "2+2=«4</s>»", id="adds EOS"),
        pytest.param({"pad": "</s>"}, "<s>2+2=«4</s>»", id="pad is EOS"),
        pytest.param({"pad": None}, "<s>2+2=«4</s>»", id="no pad"),
    ],
)
def test_prompt_and_completion(options: dict[str, Any], text: str) -> None:
    tokenizer = byte_tokenizer(**options)
    (example,) = encode_rows([Row("f:1", prompt="2+2=", completion="4")], tokenizer)
    assert spelled(example, tokenizer) == marked(text, tokenizer)
    prompt = encode_prompt("2+2=", tokenizer)
    assert prompt == example.input_ids[: len(prompt)]
    assert len(prompt) == example.completion.index(True)


def test_an_eos_already_there_is_not_doubled() -> None:
    tokenizer = byte_tokenizer(adds_eos=True)
    (example,) = encode_rows([Row("f:1", prompt="a</s>", completion="b</s>")], tokenizer)
    assert spelled(example, tokenizer) == marked("<s>a</s>«b</s>»", tokenizer)


def test_prompt_and_completion_do_not_merge() -> None:
    tokenizer = byte_tokenizer(merges_from=["ab"] * 9, merges=1)
    (example,) = encode_rows([Row("f:1", prompt="ab a", completion="b ab")], tokenizer)
    tokens, flags = spelled(example, tokenizer)
    assert tokens == ["<s>", "ab", " ", "a", "b", " ", "ab", "</s>"]
    assert flags == [False] * 4 + [True] * 4


def test_many_rows_keep_their_order_and_formats() -> None:
    tokenizer = chatml()
    pairs = [Row(f"f:{i}", prompt=f"p{i}", completion=f"c{i}") for i in range(2300)]
    rows = [*pairs, chat("user: Hi", "assistant: Yo"), *pairs[:3]]
    examples = encode_rows(rows, tokenizer)
    assert [example.where for example in examples] == [row.where for row in rows]
    for row, example in zip(pairs, examples, strict=False):
        assert tokenizer.decode(example.input_ids) == f"{row.prompt}{row.completion}<|im_end|>"


def test_supervised_counts_what_a_model_predicts() -> None:
    (example,) = encode_rows([Row("f:1", prompt="ab", completion="cd")], byte_tokenizer())
    assert example.supervised == 3
    assert Example([1, 2], [True, True], "f:1").supervised == 1


def test_no_chat_template() -> None:
    with pytest.raises(DataError, match=r"^task.jsonl:7: .*chat template"):
        encode_rows([chat("user: a", "assistant: b")], byte_tokenizer())


def test_a_template_that_refuses() -> None:
    with pytest.raises(DataError, match=r"^task.jsonl:7: .*roles must alternate"):
        encode_rows([chat("user: a", "user: a", "assistant: b")], mistral())


@pytest.mark.parametrize("template", ["{% for", "{{ messages[0].content.nothing() }}"])
def test_a_broken_template(template: str) -> None:
    with pytest.raises(DataError, match=r"^task.jsonl:7: the chat template refuses"):
        encode_rows([chat("user: a", "assistant: b")], byte_tokenizer(template=template))


def test_a_template_that_changes_earlier_answers() -> None:
    tokenizer = byte_tokenizer(
        CHATML_TOKENS, bos=None, eos="<|im_end|>", pad=None, template=REASONING
    )
    with pytest.raises(DataError, match=r"^task.jsonl:7: .*`messages\[1\]` differently"):
        encode_rows([chat(*NO_SYSTEM)], tokenizer)


def test_a_template_that_prompts_otherwise_than_it_answers() -> None:
    template = MISTRAL + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    with pytest.raises(DataError, match=r"^task.jsonl:7: .*does not begin the answer"):
        encode_rows([chat(*NO_SYSTEM)], byte_tokenizer(template=template))


def test_a_template_that_leaves_the_answer_out() -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match=r"^task.jsonl:7: .* leaves the end of `messages\[1\]` out"):
        encode_rows([chat("user: a", "assistant: b")], byte_tokenizer(template=template))


def test_a_tokenizer_without_eos() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode_rows([Row("f:1", prompt="a", completion="b")], byte_tokenizer(eos=None))


def test_text_is_all_learnt_and_ends() -> None:
    rows = [Row("f:1", text="ab c"), Row("f:2", text="it ends</s>")]
    tokenizer = byte_tokenizer()
    first, second = encode_rows(rows, tokenizer)
    assert spelled(first, tokenizer) == marked("«<s>ab c</s>»", tokenizer)
    assert spelled(second, tokenizer) == marked("«<s>it ends</s>»", tokenizer)
    assert first.labels() == [-100, *first.input_ids[1:]]  # nothing predicts BOS
    (adds_eos,) = encode_rows(rows[:1], byte_tokenizer(adds_eos=True))
    assert adds_eos.input_ids == first.input_ids
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode_rows(rows, byte_tokenizer(eos=None))


def tokens(where: str, *ids: int, learnt: str) -> Row:
    return Row(where, input_ids=ids, supervised=tuple(flag == "1" for flag in learnt))


def test_tokens_stay_as_they_are() -> None:
    notes = Notes()
    rows = [tokens("f:1", 9, 8, 7, 1, learnt="0011"), tokens("f:2", 1, 1, 5, learnt="110")]
    first, second = encode_rows(rows, byte_tokenizer(), reporter=notes)
    assert (first.input_ids, first.completion) == ([9, 8, 7, 1], [False, False, True, True])
    assert (second.input_ids, second.completion) == ([1, 1, 5], [True, True, False])
    assert notes.notes == []


def test_tokens_that_teach_no_end_are_said_once() -> None:
    notes = Notes()
    rows = [tokens(f"f:{i}", 9, 8, 1, learnt="010") for i in (1, 2, 3)]
    encode_rows([*rows, tokens("f:4", 9, 1, learnt="01")], byte_tokenizer(), reporter=notes)
    (note,) = notes.notes
    assert note.startswith("f:1 and 2 more rows: no end token among the tokens learnt")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (tokens("f:1", 9, 8, 259, learnt="111"), "token 259 is not of this model's tokenizer"),
        (tokens("f:1", 9, -1, 5, learnt="111"), "token -1 is not of this model's tokenizer"),
        (tokens("f:1", 9, 8, 7, learnt="100"), "no tokens to learn from"),
        (tokens("f:1", 9, 8, 7, learnt="000"), "no tokens to learn from"),
    ],
)
def test_tokens_that_cannot_be_learnt(row: Row, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^f:1: .*{reason}"):
        encode_rows([row], byte_tokenizer())


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (Row("f:1", prompt="a", completion="b"), "prompt-completion"),
        (Row("f:1", text="a"), "text"),
        (tokens("f:1", 9, 8, learnt="01"), "tokenized"),
    ],
)
def test_an_assistants_turns_are_those_of_conversations(row: Row, form: str) -> None:
    with pytest.raises(DataError, match=rf"^f:1: loss_on: assistant .* this row is {form}"):
        encode_rows([row], byte_tokenizer(), loss_on="assistant")


def test_a_conversation_of_which_nothing_is_learnt() -> None:
    silent = Row("f:1", messages=(Message("user", "Hi"), Message("assistant", "Yo", weight=0.0)))
    with pytest.raises(DataError, match=r"^f:1: .*no tokens to learn from: the weights are 0"):
        encode_rows([silent], chatml())
    # With the loss on all tokens, the user's are left.
    (example,) = encode_rows([silent], chatml(), loss_on="all")
    assert example.supervised == 0
    assert sum(label != -100 for label in example.labels("all")) == 20


def test_rows_that_cannot_be_used_are_skipped_up_to_a_limit() -> None:
    rows = [
        tokens("f:1", 999, learnt="1"),
        Row("f:2", prompt="a", completion="b"),
        chat("user: a", "user: a", "assistant: b"),
        Row("f:4", text="a"),
    ]
    bad = BadRows(2)
    examples = encode_rows(rows, mistral(), bad_rows=bad)
    assert [example.where for example in examples] == ["f:2", "f:4"]
    assert [row["where"] for row in bad.skipped] == ["f:1", "task.jsonl:7"]
    assert "roles must alternate" in bad.skipped[1]["reason"]
    with pytest.raises(DataError, match=r"^task.jsonl:7: .*1 bad row skipped before"):
        encode_rows(rows, mistral(), bad_rows=BadRows(1))


def test_a_row_that_makes_no_token_at_all() -> None:
    row = Row("f:1", prompt="", completion="")
    with pytest.raises(DataError, match=r"^f:1: the answer has no tokens to learn from$"):
        encode_rows([row], byte_tokenizer(adds_bos=False))

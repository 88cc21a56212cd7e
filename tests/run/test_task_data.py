"""A run's task sets: what is skipped, what overlaps, what has to be the same on resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from esft.data.example import IGNORED
from esft.errors import DataError
from esft.recipe_sections import DataSpec
from esft.run.task_data import TaskData, data_identity, prepare
from tests.notes import Notes
from tests.toy_tokenizers import MISTRAL, byte_tokenizer

TOKENIZER = byte_tokenizer(template=MISTRAL)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role} for role in roles]}


def prepared(notes: Notes | None = None, **spec: Any) -> TaskData:
    data = DataSpec.model_validate({"packing": False, "max_length": 256, **spec})
    return prepare(data, TOKENIZER, reporter=notes or Notes())


def said(data: TaskData) -> list[str]:
    return [TOKENIZER.decode(data.train_set[i]["input_ids"]) for i in range(len(data.train_set))]


def learnt(data: TaskData, index: int) -> str:
    labels = data.train_set[index]["labels"]
    return TOKENIZER.decode([label for label in labels if label != IGNORED])


def test_every_format_at_once(tmp_path: Path) -> None:
    rows = {
        "messages": chat("user", "assistant"),
        "pairs": {"prompt": "2+2=", "completion": "4"},
        "chats": {
            "prompt": chat("user", "assistant", "user")["messages"],
            "completion": chat("assistant")["messages"],
        },
        "alpaca": {"instruction": "Add.", "input": "2 2", "output": "4"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
        },
        "text": {"text": "Once"},
        "tokens": {"input_ids": TOKENIZER("<s>ab</s>")["input_ids"][1:], "labels": None},
    }
    notes = Notes()
    sources = [write(tmp_path / f"{name}.jsonl", row) for name, row in rows.items()]
    data = prepared(notes, train=sources)
    assert len(notes.notes) == len(rows)
    assert [learnt(data, index) for index in range(len(rows))] == [
        " assistant</s>",
        "4</s>",
        " assistant</s>",
        "4</s>",
        " Yo</s>",
        "Once</s>",
        "ab</s>",
    ]
    assert said(data)[2] == "<s>[INST] user [/INST] assistant</s>[INST] user [/INST] assistant</s>"
    assert said(data)[3].endswith("### Input:\n2 2\n\n### Response:\n4</s>")


def test_the_limit_holds_for_all_that_is_read_and_tokenised(tmp_path: Path) -> None:
    refused_by_the_template = chat("user", "user", "assistant")
    good = chat("user", "assistant")
    train = write(tmp_path / "a.jsonl", good, {"messages": []}, refused_by_the_template, good)
    test = write(tmp_path / "b.jsonl", good, 7)
    notes = Notes()
    data = prepared(notes, train=train, eval=test, skip_bad=3)
    # All files are read first.
    assert [row["where"] for row in data.bad_rows.skipped] == [
        f"{train}:2",
        f"{test}:2",
        f"{train}:3",
    ]
    assert "3 bad rows skipped (--skip-bad 3)" in notes.notes
    assert len(data.train_set) == 2
    assert [row.where for row in data.rows] == [f"{train}:1", f"{train}:4"]
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*\(2 bad rows skipped before this one"):
        prepared(train=train, eval=test, skip_bad=2)


def test_no_row_is_left(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", chat("user", "user", "assistant"))
    with pytest.raises(DataError, match=r"^.*a\.jsonl:1: the chat template .*; no row is left$"):
        prepared(train=train, skip_bad=1)


def test_a_row_that_a_mixture_repeats_is_one_bad_row(tmp_path: Path) -> None:
    few = write(
        tmp_path / "few.jsonl", chat("user", "assistant"), chat("user", "user", "assistant")
    )
    many = write(tmp_path / "many.jsonl", *[chat("user", "assistant")] * 20)
    sources = [{"path": few, "weight": 1}, {"path": many, "weight": 1}]
    data = prepared(train=sources, stopping_strategy="all_exhausted", skip_bad=1)
    assert [row["where"] for row in data.bad_rows.skipped] == [f"{few}:2"]
    assert len(data.train_set) == 30


def test_each_test_row_that_is_a_training_row_counts(tmp_path: Path) -> None:
    same, other = {"text": "a"}, {"text": "b"}
    train = write(tmp_path / "a.jsonl", same, same, {"text": "c"})
    test = write(tmp_path / "b.jsonl", same, other, same, other)
    notes = Notes()
    prepared(notes, train=train, eval=test)
    (said,) = (note for note in notes.notes if "data.eval" in note)
    assert said.startswith("2 of 4 rows of data.eval are in data.train, too")


def test_what_has_to_be_the_same_on_resume(tmp_path: Path) -> None:
    row = {"text": "a"}
    a, b = write(tmp_path / "a.jsonl", row), write(tmp_path / "b.jsonl", row, row)
    moved = shutil.copy(a, tmp_path / "moved.jsonl")

    def of(**spec: Any) -> dict[str, Any]:
        return data_identity(DataSpec.model_validate(spec))

    assert of(train=a) == of(train=str(moved)) == of(train=[a]) == of(train={"path": a})
    different = [
        of(train=a),
        of(train=b),
        of(train=[a, b]),
        of(train=[b, a]),
        of(train=a, eval=b),
        of(train=a, skip_bad=1),
        of(train=a, format="text"),
        of(train=[{"path": a, "weight": 2}, b]),
        of(train=[{"path": a, "weight": 3}, b]),
        of(train=[{"path": a, "weight": 2}, b], seed=1),
        of(train=[{"path": a, "weight": 2}, b], stopping_strategy="all_exhausted"),
    ]
    for index, one in enumerate(different):
        assert all(one != other for other in different[index + 1 :])
    assert json.loads(json.dumps(different)) == different


LONG = {"prompt": "a long prompt: ", "completion": "short"}


@pytest.mark.parametrize(
    ("truncation", "lengths"), [("drop", [4]), ("keep_end", [10, 4]), ("split", [4])]
)
def test_what_is_too_long_is_treated_as_asked_for_and_told(
    tmp_path: Path, truncation: str, lengths: list[int]
) -> None:
    train = write(tmp_path / "train.jsonl", LONG, {"prompt": "a", "completion": "b"})
    notes = Notes()
    for packing in (False, True):
        data = prepared(notes, train=train, max_length=10, truncation=truncation, packing=packing)
        assert data.train_set.rows == len(lengths)
        assert data.train_set.tokens == sum(lengths)
        assert data.fitted.to_dict()["dropped"] == 2 - len(lengths)
        assert len([note for note in notes.notes if "1 of 2 rows" in note]) == 1 + packing
    with pytest.raises(DataError, match=r"train\.jsonl:1: 22 tokens do not fit"):
        prepared(train=train, max_length=10, truncation="error")


def test_turns_learnt_are_those_asked_for_also_of_test_rows(tmp_path: Path) -> None:
    row = chat("user", "assistant", "user", "assistant")
    pair = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    train = write(tmp_path / "train.jsonl", pair)
    for spec, turns in (
        ({}, 1),
        ({"loss_on": "assistant"}, 2),
        ({"loss_on": "assistant", "last_turn_only": True}, 1),
    ):
        data = prepared(train=train, eval=train, **spec)
        assert learnt(data, 0) == " assistant</s>" * turns
        (example,) = data.eval.examples
        assert example.labels() == data.train_set[0]["labels"]


def test_an_end_that_the_template_lacks_is_put_there_where_asked_for(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    tokenizer = byte_tokenizer(
        template=template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    train = write(tmp_path / "train.jsonl", chat("user", "assistant"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: EOS is never supervised"):
        prepare(DataSpec(train=train), tokenizer)
    data = prepare(DataSpec(train=train, append_eos=True, packing=False), tokenizer)
    assert learnt(data, 0) == "assistant </s>"


def test_rows_set_aside_are_scored_and_not_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}=", "completion": str(n)} for n in range(20)]
    train = write(tmp_path / "train.jsonl", *rows)
    whole = said(prepared(train=train))
    data = prepared(train=train, eval_rows=6)
    aside = [TOKENIZER.decode(example.input_ids) for example in data.eval.examples]
    learnt_now = said(data)
    assert len(aside) == 6
    assert [text for text in whole if text in aside] == aside
    assert [text for text in whole if text not in aside] == learnt_now
    assert len(data.rows) == 14  # profiling does not see them either
    again = prepared(train=train, eval_rows=6)
    assert said(again) == learnt_now
    other = prepared(train=train, eval_rows=6, seed=1)
    assert said(other) != learnt_now


def test_some_rows_must_be_left_to_learn(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(DataError, match=r"data\.eval_rows: 3 of 3 training rows"):
        prepared(train=train, eval_rows=3)

"""Rows that are tokens already."""

import json
from pathlib import Path
from typing import Any

import pytest

from esft.data.encode import encode_rows
from esft.data.row import Row
from esft.data.rows import read_rows
from esft.data.sources import Source
from esft.data.token_rows import tokenized_row
from esft.errors import DataError
from tests.models import tiny
from tests.toy_tokenizers import byte_tokenizer

IDS = [1, 5, 6, 7, 2]


def supervised(**more: Any) -> list[int]:
    """Return the tokens that are learnt, the others as 0."""
    found = tokenized_row({"input_ids": IDS, **more}, "f:1")
    return [i if flag else 0 for i, flag in zip(found.input_ids, found.supervised, strict=True)]


def test_all_tokens_unless_something_says_otherwise() -> None:
    found = tokenized_row({"input_ids": IDS}, "f:1")
    assert found == Row("f:1", input_ids=tuple(IDS), supervised=(True,) * 5)
    assert found.format == "tokenized"


@pytest.mark.parametrize(
    ("keys", "learnt"),
    [
        ({"labels": [-100, -100, 6, 7, 2]}, [0, 0, 6, 7, 2]),
        ({"labels": IDS}, IDS),
        ({"completion_mask": [0, 0, 1, 1, 1]}, [0, 0, 6, 7, 2]),
        ({"completion_mask": [False, False, True, True, True]}, [0, 0, 6, 7, 2]),
        ({"assistant_masks": [0, 1, 0, 1, 0]}, [0, 5, 0, 7, 0]),
        ({"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1, 1]}, [0, 0, 0, 7, 2]),
        ({"labels": [-100, 5, 6, 7, -100], "completion_mask": [0, 0, 1, 1, 1]}, [0, 0, 6, 7, 0]),
        ({"attention_mask": [1, 1, 1, 1, 1], "labels": None}, IDS),
        ({"attention_mask": [0, 0, 1, 1, 1]}, [6, 7, 2]),
        ({"attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 7, 2]}, [0, 7, 2]),
        ({"attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 5, 6, -100, -100]}, [0, 5, 6]),
        ({"position_ids": [0, 1, 2, 3, 4], "seq_lengths": [5]}, IDS),
    ],
)
def test_what_is_learnt(keys: dict[str, Any], learnt: list[int]) -> None:
    assert supervised(**keys) == learnt


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"input_ids": []}, "`input_ids` is empty"),
        ({"input_ids": "1 2"}, "`input_ids` is a string; expected a list of whole numbers"),
        ({"input_ids": [1, 2.0]}, "`input_ids[1]` is 2.0; expected a whole number"),
        ({"input_ids": [1, True]}, "`input_ids[1]` is True; expected a whole number"),
        ({"input_ids": [1, None]}, "`input_ids[1]` is None; expected a whole number"),
        ({"input_ids": [[1, 2]]}, "`input_ids[0]` is [1, 2]; expected a whole number"),
        ({"input_ids": [1, -2]}, "`input_ids` has -2; expected 0 or more"),
        ({"labels": [1, 5]}, "`labels` has 2 items, but `input_ids` has 5"),
        ({"labels": [5, 6, 7, 2, -100]}, "`labels[0]` is 5, but `input_ids[0]` is 1"),
        ({"labels": [-100] * 5}, "no token is to be learnt"),
        ({"completion_mask": [0, 0, 0, 0, 2]}, "`completion_mask[4]` is 2; expected 0 or 1"),
        ({"completion_mask": [0] * 5}, "no token is to be learnt"),
        ({"attention_mask": [1, 1]}, "`attention_mask` has 2 items"),
        ({"attention_mask": [0] * 5}, "`attention_mask` is 0 everywhere"),
        ({"attention_mask": [1, 0, 1, 1, 1]}, "is 0 in the middle (item 1)"),
        (
            {"attention_mask": [1, 1, 0, 0, 0], "labels": [-100, -100, 6, 7, 2]},
            "no token is to be learnt",
        ),
        ({"seq_lengths": [2, 3]}, "a packed block of several rows (`seq_lengths`)"),
        ({"position_ids": [0, 1, 0, 1, 2]}, "a packed block of several rows (`position_ids`)"),
    ],
)
def test_bad_tokens(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        supervised(**keys)
    message = str(caught.value)
    assert message.startswith("f:1: ")
    assert said in message


def test_rows_that_trl_prepared(tmp_path: Path) -> None:
    """TRL's SFTTrainer tokenises and labels; its rows say the same as ours of the same pairs."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_tokenizer(adds_bos=False)
    pairs = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+3=", "completion": "6 "}]
    trainer = SFTTrainer(
        model=tiny("qwen3_moe", vocab_size=300),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ours = encode_rows(read_rows(tmp_path / "pairs.jsonl"), tokenizer)
    trainer.train_dataset.to_json(tmp_path / "trl.jsonl")
    trainer.train_dataset.to_parquet(tmp_path / "trl.parquet")
    for name in ("trl.jsonl", "trl.parquet"):
        # They hold the pairs, too.
        with pytest.raises(DataError, match=r"fits the formats prompt-completion .* and tokenized"):
            read_rows(tmp_path / name)
        rows = read_rows(Source(str(tmp_path / name), format="tokenized"))
        theirs = encode_rows(rows, tokenizer)
        assert [example.input_ids for example in theirs] == [example.input_ids for example in ours]
        assert [example.labels() for example in theirs] == [example.labels() for example in ours]
        assert [example.labels() for example in theirs] == trainer.train_dataset["labels"][:]

"""Which row each token of a batch is of, and what is padding."""

from __future__ import annotations

import pytest
import torch

from esft.data.documents import documents
from esft.data.example import Example
from esft.data.packing import collate, pack, separate

LENGTHS = (5, 3, 7, 2, 4)


def examples() -> list[Example]:
    """Rows of ever other ids, the last two tokens of which are the answer."""
    return [
        Example(
            list(range(10 * n, 10 * n + length)),
            [place >= length - 2 for place in range(length)],
            f"rows:{n}",
        )
        for n, length in enumerate(LENGTHS, start=1)
    ]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_padded_rows(loss_on: str) -> None:
    made = separate(examples(), 16, loss_on=loss_on)  # type: ignore[arg-type]
    batch = collate([made[i] for i in range(len(made))], pad_id=11)
    found = documents(batch).view_as(batch["input_ids"]).tolist()
    longest = max(LENGTHS)
    assert found == [[n] * length + [-1] * (longest - length) for n, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("pad_id", [0, 11])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_packed_rows(pad_id: int, loss_on: str) -> None:
    """Blocks of 10 tokens; padding has an id that is a token of a row, too."""
    made = pack(examples(), 10, pad_id=pad_id, loss_on=loss_on)  # type: ignore[arg-type]
    batch = collate([made[i] for i in range(len(made))], pad_id=pad_id)
    ids, found = batch["input_ids"].flatten().tolist(), documents(batch).tolist()
    rows: dict[int, list[int]] = {}
    for number, token in zip(found, ids, strict=True):
        rows.setdefault(number, []).append(token)
    padding = rows.pop(-1)
    assert padding == [pad_id] * (len(ids) - sum(LENGTHS))
    assert [rows[number] for number in sorted(rows)] == [e.input_ids for e in examples()]
    assert list(rows) == sorted(rows)


def test_a_block_that_is_full_has_no_padding() -> None:
    made = pack(examples()[:2], 8, pad_id=0)
    batch = collate([made[0]], pad_id=0)
    assert documents(batch).tolist() == [0] * 5 + [1] * 3


def test_without_a_mask_all_tokens_count() -> None:
    assert documents({"input_ids": torch.zeros(2, 3)}).tolist() == [0, 0, 0, 1, 1, 1]

"""An order made even for several processes: nothing is drawn twice; what fills it has no rows."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from esft.data.evened import Evened
from esft.data.numbered import ITEMS, Numbered
from esft.data.packing import TrainSet, collate


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("items", [1, 5, 12, 14])
def test_the_shares_of_a_step_are_the_rows_of_one_process(
    items: int, batch: int, processes: int
) -> None:
    order = Evened(SequentialSampler(range(items)), items, batch * processes)
    shares = [
        list(BatchSamplerShard(BatchSampler(order, batch, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert len(order) == len(list(order))
    assert len({len(share) for share in shares}) == 1, "all take as many steps"
    steps = [
        sorted(index for share in step for index in share if index < items)
        for step in zip(*shares, strict=True)
    ]
    rows, each = list(range(items)), batch * processes
    assert steps == [rows[start : start + each] for start in range(0, items, each)]


def test_iterating_a_train_set_ends_after_its_rows() -> None:
    """transformers measures the rows of `group_by_length` so."""
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    train_set = TrainSet([row] * 3, [["a:1"], ["a:2"], ["a:3"]], packed=False, tokens=6)
    numbered = Numbered(train_set, functools.partial(collate, pad_id=0))
    assert [item[ITEMS] for item in itertools.islice(numbered, 9)] == [0, 1, 2]


def test_what_fills_up_has_no_labels_and_no_index() -> None:
    made = [{"input_ids": [n, n, n], "labels": [-100, n, n]} for n in range(1, 4)]
    train_set = TrainSet(made, [["a:1"], ["a:2"], ["a:3"]], packed=False, tokens=9)
    numbered = Numbered(train_set, functools.partial(collate, pad_id=0))
    partly = numbered.collate([numbered[2], numbered[3]])
    assert partly[ITEMS] == [2]
    assert partly["input_ids"].tolist() == [[3, 3, 3]]
    wholly = numbered.collate([numbered[3], numbered[4]])
    assert wholly[ITEMS] == []
    assert wholly["input_ids"].shape == (1, 3)
    assert torch.equal(wholly["labels"], torch.full((1, 3), -100))

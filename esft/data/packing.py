"""Examples to what a trainer draws: packed blocks or padded batches; and samples of a set size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from esft.data.example import IGNORED, Example, LossOn
from esft.data.fitting import fit
from esft.errors import DataError
from esft.progress import SILENT, Reporter

Item = dict[str, list[Any]]

# What stands where a row has ended; `input_ids` may hold any id there.
_FILL: dict[str, Any] = {"labels": IGNORED, "loss_weights": 0.0}


class TrainSet(Dataset[Item]):
    """Items for a torch data loader; `collate` makes batches of them.

    Each item maps `input_ids` and `labels`, packed also `position_ids`, to lists of one length.
    A label stands at the place of its token (transformers' losses shift them) and is `IGNORED`
    where there is nothing to learn. Where a label of the set has a weight other than 1, every item
    also has `loss_weights`, a factor for each token's loss.

    Attributes:
        packed: whether an item is a block of several rows.
        rows: how many rows are in the set.
        tokens: how many tokens these rows have; padding does not count.
        supervised: how many tokens have a label.
        weighted: whether the items have `loss_weights`.
        where: of each item, the `file:line` of the rows in it.
    """

    def __init__(
        self, items: Sequence[Item], where: Sequence[Sequence[str]], *, packed: bool, tokens: int
    ) -> None:
        self._items = items
        self.where = where
        self.packed = packed
        self.rows = sum(map(len, where))
        self.tokens = tokens
        self.supervised = sum(label != IGNORED for item in items for label in item["labels"])
        self.weighted = any("loss_weights" in item for item in items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each item has."""
        return [len(item["input_ids"]) for item in self._items]

    def __getitem__(self, index: int) -> Item:
        return self._items[index]


def pack(
    examples: Sequence[Example],
    max_length: int,
    *,
    pad_id: int,
    loss_on: LossOn = "completion",
    reporter: Reporter = SILENT,
) -> TrainSet:
    """Pack examples into blocks of exactly `max_length` tokens.

    In the order given: an example goes into the current block if it fits there whole, else it
    starts the next. (Fuller blocks, as by first-fit-decreasing, would reorder the data.)
    `position_ids` restart at 0 with every example. Without an attention mask, transformers reads
    from them which tokens may see each other, so that a packed example gets the loss it has
    alone. The padding at the end of a block is a document of its own, without labels.

    Args:
        examples: from `encode_rows`.
        max_length: tokens a block.
        pad_id: any token id; it is recognised by its place, never by its value.
        loss_on: whether answers have labels, or `all` tokens; see `Example.labels`.
        reporter: told about examples that do not fit and are left out; see `fit`, which may be
            called before and knows other ways to treat them.

    Raises:
        DataError: not one example fits.
    """
    kept = fit(examples, max_length, reporter=reporter).examples
    rows = _items(kept, loss_on)
    blocks: list[Item] = []
    where: list[list[str]] = []
    room = 0
    for example, row in zip(kept, rows, strict=True):
        length = len(example.input_ids)
        if length > room:
            blocks.append({key: [] for key in (*row, "position_ids")})
            where.append([])
            room = max_length
        for key, values in row.items():
            blocks[-1][key] += values
        blocks[-1]["position_ids"] += range(length)
        where[-1].append(example.where)
        room -= length
    fill = {"input_ids": pad_id, **_FILL}
    for block in blocks:
        missing = max_length - len(block["input_ids"])
        for key in rows[0]:
            block[key] += [fill[key]] * missing
        block["position_ids"] += range(missing)
    return TrainSet(blocks, where, packed=True, tokens=_tokens(kept))


def separate(
    examples: Sequence[Example],
    max_length: int,
    *,
    loss_on: LossOn = "completion",
    reporter: Reporter = SILENT,
) -> TrainSet:
    """Keep examples apart, one an item; `collate` pads them to the longest of a batch.

    Args and errors as for `pack`.
    """
    kept = fit(examples, max_length, reporter=reporter).examples
    where = [[example.where] for example in kept]
    return TrainSet(_items(kept, loss_on), where, packed=False, tokens=_tokens(kept))


def collate(items: Sequence[Item], *, pad_id: int = 0) -> dict[str, Any]:
    """Make a batch of a `TrainSet`'s items.

    Args:
        items: B items, all packed or all separate.
        pad_id: any token id; what is padding follows from the lengths, so it may equal EOS.

    Returns:
        Keyword arguments of a transformers model: `input_ids` and `labels` [B, S], int64, with
        `position_ids` [B, S] if packed, else with `attention_mask` [B, S]; padded on the right.
        `use_cache` is False: given a cache, transformers does not look for packed examples.
        Where items have `loss_weights`, those too, [B, S], float32; they are for
        `esft.run.labelled.labelled_logits`, a model does not know them.
    """
    longest = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": pad_id, **_FILL}
    batch: dict[str, Any] = {
        key: torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in items])
        for key, value in fill.items()
        if key in items[0]
    }
    if "position_ids" in items[0]:
        batch["position_ids"] = torch.tensor([item["position_ids"] for item in items])
    else:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch | {"use_cache": False}


def sample(
    examples: Sequence[Example], tokens: int, seed: int, *, seq_len: int | None = None
) -> list[Example]:
    """Draw examples until they have `tokens` tokens together.

    The examples are shuffled and taken whole; the last is cut so that the sum is exact. Fewer
    tokens come back only if all examples together have fewer.

    Args:
        examples: from `encode_rows`.
        tokens: the budget.
        seed: of the order; the same seed and examples give the same sample.
        seq_len: cut longer examples to this many tokens.

    Raises:
        DataError: the budget or `seq_len` is not positive, or there are no examples.
    """
    if tokens < 1:
        raise DataError(f"a sample of {tokens} tokens: expected at least 1")
    if seq_len is not None and seq_len < 1:
        raise DataError(f"a sequence length of {seq_len}: expected at least 1")
    if not examples:
        raise DataError("no rows to take a sample from")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    drawn: list[Example] = []
    left = tokens
    for index in order:
        if not left:
            break
        example = examples[index]
        length = min(len(example.input_ids), seq_len or left, left)
        drawn.append(example.part(0, length))
        left -= length
    return drawn


def _items(examples: Sequence[Example], loss_on: LossOn) -> list[Item]:
    items: list[Item] = [
        {"input_ids": example.input_ids, "labels": example.labels(loss_on)} for example in examples
    ]
    weighted = any(
        label != IGNORED and weight != 1
        for example, item in zip(examples, items, strict=True)
        for label, weight in zip(item["labels"], example.weights or (), strict=False)
    )
    if weighted:
        for example, item in zip(examples, items, strict=True):
            item["loss_weights"] = example.weights or [1.0] * len(example.input_ids)
    return items


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)

"""Which tokens of a batch belong together, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esft.data.example import IGNORED


def documents(batch: Mapping[str, Any]) -> Tensor:
    """Number the rows of a batch that `esft.data.packing.collate` made, token by token.

    In a packed block every row starts at position 0. The padding at its end looks like a row too,
    but has no label, while a row that teaches nothing is refused before it is packed.

    Args:
        batch: `input_ids` `[B, S]` with `attention_mask`, or with `position_ids` and `labels`.

    Returns:
        `[B * S]` int64: the row's number, from 0 on and ascending; -1 for padding. A number may be
        missing.
    """
    ids_BS: Tensor = batch["input_ids"]
    if "position_ids" not in batch:
        row_BS = torch.arange(len(ids_BS), device=ids_BS.device)[:, None].expand_as(ids_BS)
        mask_BS = batch.get("attention_mask")
        return (row_BS if mask_BS is None else row_BS.masked_fill(mask_BS == 0, -1)).flatten()
    row_BS = (batch["position_ids"] == 0).flatten().cumsum(0).view_as(ids_BS) - 1
    last_BS = row_BS == row_BS[:, -1:]
    taught_B = (last_BS & (batch["labels"] != IGNORED)).any(dim=1)
    return row_BS.masked_fill(last_BS & ~taught_B[:, None], -1).flatten()

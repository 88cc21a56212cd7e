"""Which rows go to which expert: rows sorted by slot, so the selected experts' are a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The rows of one bank, in the order of its experts.

    Attributes:
        row: `[M]` int64, position of each row in the flattened `[T*K]` routing.
        token: `[M]` int64, the token that each row is a copy of.
        offsets: `[G]` int32, where each of the bank's G experts ends within these rows.
    """

    row: Tensor
    token: Tensor
    offsets: Tensor


def split_rows(topk_index: Tensor, slot: Tensor, num_selected: int) -> tuple[Segment, Segment]:
    """Sort the routed rows by slot and cut them into the trainable and the frozen bank's.

    The sort is stable, so that equal input gives equal bits. One host sync: the cut's position.

    Args:
        topk_index: `[T, K]` expert ids.
        slot: `[E]` int64, see `ExpertBank`.
        num_selected: n.

    Returns:
        the rows of the n selected experts, and those of the other E - n.
    """
    slots = slot[topk_index.reshape(-1)]
    order = torch.argsort(slots, stable=True)
    offsets = torch.bincount(slots, minlength=slot.shape[0]).cumsum(0)
    cut = int(offsets[num_selected - 1]) if num_selected else 0
    token = order.div(topk_index.shape[1], rounding_mode="floor")
    offsets = offsets.to(torch.int32)
    return (
        Segment(order[:cut], token[:cut], offsets[:num_selected]),
        Segment(order[cut:], token[cut:], offsets[num_selected:] - cut),
    )

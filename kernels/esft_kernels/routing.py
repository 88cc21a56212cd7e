"""Which rows go to which expert: rows sorted by slot, so the selected experts' are a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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


@dataclass(frozen=True)
class Routing:
    """All routed rows: the trainable bank's, then the frozen bank's.

    Attributes:
        selected: the rows of the n selected experts.
        frozen: those of the other E - n.
        place: `[T, K]` int64, where each routed row stands once the two are joined.
    """

    selected: Segment
    frozen: Segment
    place: Tensor

    def sum_by_token(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add up each token's K rows: `out[t] = sum_k weight[t, k] * rows[place[t, k]]`.

        Args:
            rows: `[N, H]`, the selected rows, then the frozen ones.
            weight: `[T, K]` in the dtype of rows, or None for ones.

        Returns:
            `[T, H]`, summed in the order of k.
        """
        # An embedding bag gathers, scales and sums in one pass over the rows.
        return F.embedding_bag(self.place, rows, per_sample_weights=weight, mode="sum")


def route(topk_index: Tensor, slot: Tensor, num_selected: int) -> Routing:
    """Sort the routed rows by slot and cut them into the trainable and the frozen bank's.

    The sort is stable, so that equal input gives equal bits. One host sync: the cut's position.

    Args:
        topk_index: `[T, K]` expert ids.
        slot: `[E]` int64, see `ExpertBank`.
        num_selected: n.
    """
    slots = slot.index_select(0, topk_index.reshape(-1))
    order = torch.argsort(slots, stable=True)
    # Not by counting: `bincount` waits for the device to learn the highest slot.
    experts = torch.arange(slot.shape[0], device=slots.device)
    offsets = torch.searchsorted(slots.index_select(0, order), experts, right=True)
    cut = int(offsets[num_selected - 1]) if num_selected else 0
    token = order.div(topk_index.shape[1], rounding_mode="floor")
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    offsets = offsets.to(torch.int32)
    return Routing(
        Segment(order[:cut], token[:cut], offsets[:num_selected]),
        Segment(order[cut:], token[cut:], offsets[num_selected:] - cut),
        place.view(topk_index.shape),
    )

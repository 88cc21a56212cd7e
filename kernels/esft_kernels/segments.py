"""The routed rows of the PyTorch path: sorted by slot and cut in two, one segment a bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from esft_kernels.bank import ExpertBank
from esft_kernels.checks import bad_ids


@dataclass(frozen=True)
class Segment:
    """The rows of one bank, in the order of its experts.

    Attributes:
        row: `[M]` int64, position of each row in the flattened `[T*K]` routing.
        token: `[M]` int64, the token that each row is a copy of.
        offsets: `[G]` int32, where each of the bank's G experts ends within these rows.
        ends: the same, for the host.
    """

    row: Tensor
    token: Tensor
    offsets: Tensor
    ends: Sequence[int]


@dataclass(frozen=True)
class Segments:
    """All routed rows: the trainable bank's, then the frozen bank's.

    Attributes:
        selected: the rows of the n selected experts.
        frozen: those of the other E - n.
        place: `[T, K]` int64, where each routed row stands once the two are joined; the number of
            joined rows, for a row whose expert is held elsewhere.
        complete: whether every row has its expert here.
    """

    selected: Segment
    frozen: Segment
    place: Tensor
    complete: bool

    def sum_by_token(self, parts: list[Tensor], weight: Tensor | None = None) -> Tensor:
        """Add up each token's K rows: `out[t] = sum_k weight[t, k] * rows[place[t, k]]`.

        Args:
            parts: the selected rows, then the frozen ones, `[M, H]` each.
            weight: `[T, K]` in the dtype of rows, or None for ones.

        Returns:
            `[T, H]`, summed in the order of k.
        """
        absent = None
        if not self.complete:
            # One more row, which the sum leaves out whatever its weight.
            absent = sum(part.shape[0] for part in parts)
            parts = [*parts, parts[0].new_zeros(1, parts[0].shape[1])]
        filled = [part for part in parts if part.shape[0]]
        rows = filled[0] if len(filled) == 1 else torch.cat(parts)
        # An embedding bag gathers, scales and sums in one pass over the rows.
        return F.embedding_bag(
            self.place, rows, per_sample_weights=weight, mode="sum", padding_idx=absent
        )


def cut(topk_index: Tensor, bank: ExpertBank) -> Segments:
    """Sort the routed rows by slot and cut them into the trainable and the frozen bank's.

    The sort is stable, so that equal input gives equal bits. One host sync.

    Args:
        topk_index: `[T, K]` expert ids; -1 or E where the expert is held elsewhere.
        bank: whose slots count.

    Raises:
        ValueError: an id is below -1 or above E.
    """
    E, slots, num_selected = bank.num_experts, bank.num_slots, bank.num_selected
    flat = topk_index.reshape(-1).long()
    # Rows of experts that are held elsewhere get slot S, behind all others.
    slot = F.pad(bank.slot, (1, 1), value=slots).index_select(0, (flat + 1).clamp(0, E + 1))
    order = torch.argsort(slot, stable=True)
    # Not by counting: `bincount` waits for the device to learn the highest slot.
    experts = torch.arange(slots, device=slot.device)
    offsets = torch.searchsorted(slot.index_select(0, order), experts, right=True)
    bounds = torch.stack(flat.aminmax()) if flat.numel() else offsets.new_zeros(2)
    least, most, *ends = torch.cat([bounds, offsets]).tolist()
    middle, end = ends[num_selected - 1] if num_selected else 0, ends[-1]
    if least < -1 or most > E:
        raise bad_ids(topk_index, E)
    token = order.div(topk_index.shape[1], rounding_mode="floor")
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device).clamp(max=end)
    offsets = offsets.to(torch.int32)
    return Segments(
        Segment(order[:middle], token[:middle], offsets[:num_selected], ends[:num_selected]),
        Segment(
            order[middle:end],
            token[middle:end],
            offsets[num_selected:] - middle,
            [place - middle for place in ends[num_selected:]],
        ),
        place.view(topk_index.shape),
        end == flat.shape[0],
    )

"""Expert capacity: how many tokens of a sequence an expert takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def within_capacity(
    index_BSK: Tensor,
    num_experts: int,
    factor: float,
    minimum: int,
    counted_BS: Tensor | None = None,
) -> Tensor:
    """Say which choices find room: an expert takes `ceil(factor * K * n / E)` of a row's n tokens.

    First choices come before second ones, and within each, earlier tokens before later ones
    (GShard, arXiv 2006.16668, algorithm 1). What comes after an expert is full is dropped.

    Args:
        index_BSK: expert ids, best first, `[B, S, K]`.
        num_experts: E.
        factor: the capacity factor; at 1, experts that are used alike are just full.
        minimum: an expert takes this many tokens at least.
        counted_BS: 0 for padding, which takes no room and gets none; None if there is none.

    Returns:
        bool, `[B, S, K]`.
    """
    B, S, K = index_BSK.shape
    queue = F.one_hot(index_BSK.transpose(1, 2).reshape(B, K * S), num_experts)
    if counted_BS is None:
        counted_BS = index_BSK.new_ones(B, S)
    counted_BS = counted_BS.to(device=index_BSK.device, dtype=torch.int64)
    queue = queue * counted_BS.repeat(1, K)[..., None]
    # Of each choice, how many of the same expert there are up to it; 0 for padding.
    place = (queue.cumsum(dim=1) * queue).sum(dim=-1)
    # 25 * 2.2 / 5 is 11.000000000000002 in binary, which is no room for a 12th token.
    room_B = torch.ceil(counted_BS.sum(dim=1).double() * K * factor / num_experts - 1e-9)
    room_B = room_B.clamp(min=minimum)
    kept = (place > 0) & (place <= room_B[:, None])
    return kept.view(B, K, S).transpose(1, 2)

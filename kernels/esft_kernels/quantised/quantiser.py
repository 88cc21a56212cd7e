"""From a weight to blocks of few bits, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from esft_kernels.quantised.fitting import fit
from esft_kernels.quantised.packing import pack
from esft_kernels.quantised.storage import Quantised

_PIECE = 2**18
"""Weights of a piece; a few buffers of its size in fp32 are all that is needed at a time."""


def quantise(
    weight: Tensor, kind: str, block: int = 64, *, dtype: torch.dtype | None = None
) -> Quantised:
    """Store a weight in blocks along its last dimension.

    Deterministic, and each block by itself: an expert of a bank gets the bits that it gets alone.

    Args:
        weight: `[..., C]`, floats, any strides. On the meta device nothing is computed.
        kind: one of `KINDS`.
        block: weights that share a scale, a multiple of 8.
        dtype: in which the weight is computed with; default its own.

    Returns:
        The weight in `KINDS[kind].bits_per_weight(block)` bits each.

    Raises:
        ValueError: no such kind or block, not a float, or a weight is NaN or infinite in fp32.
    """
    if not weight.is_floating_point() or weight.dim() == 0:
        raise ValueError(f"weight: expected rows of floats, got {weight.dtype} {weight.dim()}-d")
    stored = Quantised.empty(
        weight.shape, kind, block, dtype=dtype or weight.dtype, device=weight.device
    )
    if weight.device.type == "meta":
        return stored
    with torch.no_grad():
        _fill(weight if weight.dim() > 1 else weight[None], stored)
    return stored


def _fill(weight: Tensor, stored: Quantised) -> None:
    tensors = {name: tensor.view(-1, tensor.shape[-1]) for name, tensor in stored.tensors().items()}
    whole = stored.columns // stored.block * stored.block
    for start, piece in _pieces(weight):
        rows = piece.float()
        if not torch.isfinite(rows).all():
            raise _not_finite(rows, start, stored.shape)
        parts = [rows[:, :whole].unflatten(1, (-1, stored.block))] if whole else []
        if whole < stored.columns:
            parts.append(rows[:, None, whole:])
        fits = [fit(part, stored.form) for part in parts]
        own = slice(start, start + rows.shape[0])
        codes = torch.cat([found.codes.flatten(1) for found in fits], dim=1)
        tensors["codes"][own] = pack(codes, stored.form)
        tensors["scale"][own] = torch.cat([found.scale for found in fits], dim=1)
        if "offset" in tensors:
            tensors["offset"][own] = torch.cat([found.offset for found in fits], dim=1)


def _pieces(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield rows `[rows, C]` and where they start among all, without a copy of the weight."""
    # A matrix of any strides is cut into rows as it is; more dimensions may not be.
    matrices = [weight.view(-1, weight.shape[-1])] if weight.is_contiguous() else _matrices(weight)
    start = 0
    for matrix in matrices:
        for piece in matrix.split(max(1, _PIECE // weight.shape[-1])):
            yield start, piece
            start += piece.shape[0]


def _matrices(weight: Tensor) -> Iterator[Tensor]:
    if weight.dim() == 2:
        yield weight
    else:
        for part in weight:
            yield from _matrices(part)


def _not_finite(rows: Tensor, start: int, shape: torch.Size) -> ValueError:
    row, column = (~torch.isfinite(rows)).nonzero()[0].tolist()
    place = torch.unravel_index(torch.tensor((start + row) * shape[-1] + column), shape)
    return ValueError(
        f"weight: expected finite numbers, got {float(rows[row, column])} at "
        f"{[int(index) for index in place]}"
    )

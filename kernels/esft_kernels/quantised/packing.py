"""Codes of 4, 3 and 2 bits in bytes: the first code of a byte in its highest bits.

Three bits are two rows of bytes, one after the other: the codes' two low bits, four to a byte, then
their high bits, eight to a byte. So each part is looked up by whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from esft_kernels.quantised.kinds import Kind


def pack(codes: Tensor, kind: Kind) -> Tensor:
    """Put a row's codes into bytes.

    Args:
        codes: `[rows, C]` uint8, or int8 for `int8`, which stays as it is.
        kind: whose codes these are.

    Returns:
        `[rows, kind.row_bytes(C)]`; bits behind the last code are 0.
    """
    if kind.bits == 8:
        return codes
    width = kind.row_bytes(codes.shape[1]) * 8 // kind.bits
    codes = F.pad(codes, (0, width - codes.shape[1]))
    if kind.bits == 3:
        return torch.cat([_pack(codes & 3, 2), _pack(codes >> 2, 1)], dim=1)
    return _pack(codes, kind.bits)


def unpack(packed: Tensor, kind: Kind) -> Tensor:
    """Return the codes of rows: what `pack` took, and 0 for the bits behind them.

    Args:
        packed: `[rows, bytes]`.
        kind: whose codes these are.

    Returns:
        `[rows, bytes * 8 / bits]` int8, contiguous.
    """
    if kind.bits == 8:
        return packed
    if kind.bits == 3:
        low, high = packed.split([packed.shape[1] // 3 * 2, packed.shape[1] // 3], dim=1)
        return _unpack(high, 1).mul_(4).add_(_unpack(low, 2))
    return _unpack(packed, kind.bits)


def look_up(table: Tensor, packed: Tensor) -> Tensor:
    """Replace each byte by the entry of a table: one gather of whole elements.

    Args:
        table: `[256]`.
        packed: `[rows, bytes]` uint8.

    Returns:
        `[rows, bytes]` in table's dtype, contiguous.
    """
    index = packed.reshape(-1).to(torch.int32)
    return table.to(packed.device).index_select(0, index).view(packed.shape)


def codes_of_bytes(bits: int) -> Tensor:
    """Return the codes that each byte holds: `[256, 8 / bits]` int8."""
    shifts, top = range(8 - bits, -1, -bits), 2**bits - 1
    codes = [[byte >> shift & top for shift in shifts] for byte in range(256)]
    return torch.tensor(codes, dtype=torch.int8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    together = 8 // bits
    packed = codes[:, ::together] << (8 - bits)
    for place in range(1, together):
        packed |= codes[:, place::together] << (8 - bits * (place + 1))
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return look_up(_TABLES[bits], packed).view(torch.int8)


# All codes of a byte as one number. Made when imported, not when first needed: that may be while
# PyTorch pretends. And made of Python's numbers: a computation would start PyTorch's pool of
# threads, which a process that is forked after the imports would have to replace.
_TABLES = {
    bits: codes_of_bytes(bits).view(whole)[:, 0]
    for bits, whole in ((4, torch.int16), (2, torch.int32), (1, torch.int64))
}

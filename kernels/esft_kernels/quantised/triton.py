"""`dequantise` as a kernel: the experts of a chunk that have rows, into a buffer."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.quantised.kinds import KINDS
from esft_kernels.quantised.storage import Quantised

# Nothing to tune: a pass over memory. Triton's interpreter takes time by the program.
_GPU = {"BR": 8, "BC": 256, "num_warps": 4}
_INTERPRETER = {"BR": 64, "BC": 64}


def dequantise(stored: Quantised, offsets: Tensor, out: Tensor) -> None:
    """Write the weights of experts that have rows; the others' memory is left as it is.

    Args:
        stored: `[G, R, C]`.
        offsets: `[G + 1 or more]` int32: expert g has rows `offsets[g]` to `offsets[g + 1]`.
        out: `[G, R, C]`, contiguous.
    """
    G, R, C = stored.shape
    if out.numel() == 0:
        return
    kind = stored.form
    tile = _INTERPRETER if out.device.type == "cpu" else _GPU
    # Without an offset any pointer does: the kernel does not look.
    offset = stored.scale if stored.offset is None else stored.offset
    book = _book(kind.name, out.device)
    _dequantise[(triton.cdiv(R, tile["BR"]) * triton.cdiv(C, tile["BC"]), G)](
        stored.codes, stored.scale, offset, book, offsets, out,
        R=R, C=C, BYTES=stored.codes.shape[-1], BLOCKS=stored.scale.shape[-1], BLOCK=stored.block,
        BITS=kind.bits, CODEBOOK=kind.codebook is not None, HAS_OFFSET=kind.offset,
        **tile,
    )  # fmt: skip


@functools.cache
def _book(kind: str, device: torch.device) -> Tensor:
    """Return a kind's codebook: `[codes]` fp32; of a kind without one, something to point at."""
    return torch.tensor(KINDS[kind].codebook or (0.0,), device=device)


@triton.jit(do_not_specialize_on_alignment=["ENDS"])
def _dequantise(
    CODES, SCALE, OFFSET, BOOK, ENDS, OUT,
    R: tl.constexpr, C: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, CODEBOOK: tl.constexpr, HAS_OFFSET: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    if tl.load(ENDS + expert) == tl.load(ENDS + expert + 1):
        return
    pr, pc = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    r, c = pr * BR + tl.arange(0, BR), pc * BC + tl.arange(0, BC)
    mask = (r < R)[:, None] & (c < C)[None, :]
    base = expert.to(tl.int64)
    row = CODES + base * (R * BYTES) + r[:, None] * BYTES
    if BITS == 8:
        values = tl.load(row + c[None, :], mask=mask, other=0).to(tl.float32)
    else:
        if BITS == 3:
            # Two low bits, four codes to a byte; behind them the high bits, eight to a byte.
            low = tl.load(row + c[None, :] // 4, mask=mask, other=0).to(tl.int32)
            high = tl.load(row + BYTES // 3 * 2 + c[None, :] // 8, mask=mask, other=0).to(tl.int32)
            codes = (low >> (6 - c % 4 * 2)[None, :]) & 3
            codes += ((high >> (7 - c % 8)[None, :]) & 1) * 4
        else:
            TOGETHER: tl.constexpr = 8 // BITS
            byte = tl.load(row + c[None, :] // TOGETHER, mask=mask, other=0).to(tl.int32)
            codes = (byte >> ((TOGETHER - 1 - c % TOGETHER) * BITS)[None, :]) & (2**BITS - 1)
        if CODEBOOK:
            values = tl.load(BOOK + codes)
        else:
            values = codes.to(tl.float32)
    block = base * (R * BLOCKS) + r[:, None] * BLOCKS + c[None, :] // BLOCK
    values *= tl.load(SCALE + block, mask=mask, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        values += tl.load(OFFSET + block, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        OUT + base * (R * C) + r[:, None] * C + c[None, :],
        values.to(OUT.dtype.element_ty),
        mask=mask,
    )

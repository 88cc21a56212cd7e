"""Quantised weights for tests: read by numpy bit by bit, and layers whose frozen banks they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from esft_kernels import ExpertBank, Projection
from esft_kernels.quantised import Quantised, quantise
from torch import Tensor

BITS = {"int8": 8, "nf4": 4, "int4": 4, "int3": 3, "int2": 2}
# As bitsandbytes prints `bnb.functional.get_4bit_type("nf4")`, to all digits of fp32.
# fmt: off
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)
# fmt: on


def codes_of(stored: Quantised) -> np.ndarray:
    """Read the codes, `[..., C]`, from the bits of each row."""
    rows = stored.codes.numpy()
    if stored.kind == "int8":
        return rows
    bits = np.unpackbits(rows, axis=-1)

    def numbers(part: np.ndarray, width: int) -> np.ndarray:
        return part.reshape(*part.shape[:-1], part.shape[-1] // width, width) @ (
            2 ** np.arange(width)[::-1]
        )

    if stored.kind == "int3":
        low = bits.shape[-1] // 3 * 2
        codes = numbers(bits[..., :low], 2) + 4 * numbers(bits[..., low:], 1)
    else:
        codes = numbers(bits, BITS[stored.kind])
    return codes[..., : stored.columns]


def by_weight(numbers: Tensor, stored: Quantised) -> np.ndarray:
    """Repeat each block's scale or offset for its columns: `[..., C]` fp32."""
    repeated = numbers.float().numpy().repeat(stored.block, axis=-1)
    return repeated[..., : stored.columns]


def weights_of(stored: Quantised) -> Tensor:
    """Compute the weights in fp32, one operation a step, from the format's description."""
    codes = codes_of(stored)
    values = NF4[codes] if stored.kind == "nf4" else codes.astype(np.float32)
    weights = values * by_weight(stored.scale, stored)
    if stored.offset is not None:
        weights = weights + by_weight(stored.offset, stored)
    return torch.from_numpy(weights)


def with_stored(bank: ExpertBank, kind: str, block: int = 16) -> tuple[ExpertBank, ExpertBank]:
    """Return the bank with its frozen weights quantised; and with what these stand for, dense."""

    def both(projection: Projection) -> tuple[Projection, Projection]:
        stored = quantise(projection.frozen, kind, block)
        dense = weights_of(stored).to(stored.dtype)
        return replace(projection, frozen=stored), replace(projection, frozen=dense)

    ups, downs = both(bank.up), both(bank.down)
    stored, dense = (replace(bank, up=ups[i], down=downs[i]) for i in range(2))
    return stored, dense

"""The kinds of storage: how many bits a code has, and what value a code stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALES = torch.bfloat16
"""Of scales and offsets: fp32's range in 16 bits. Codes are chosen for the rounded scale, so that
its 8 digits cost next to nothing."""

# Source: Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E: quantiles of the normal
# distribution, divided by the largest. The numbers are those of bitsandbytes.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Kind:
    """A kind of storage.

    Attributes:
        name: its key in `KINDS`.
        bits: of a code.
        codebook: the value of each code; None where a code is a whole number.
        offset: whether each block has an offset beside its scale: `scale * code + offset`, with
            codes from 0 to `2^bits - 1`.
    """

    name: str
    bits: int
    codebook: tuple[float, ...] | None = None
    offset: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return 127 if self.name == "int8" else 2**self.bits - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the tensor that holds the codes."""
        return torch.int8 if self.name == "int8" else torch.uint8

    def row_bytes(self, columns: int) -> int:
        """Return how many bytes the codes of a row take: whole ones, for 3 bits whole threes."""
        together = 8 if self.bits == 3 else 8 // self.bits
        return -(-columns // together) * together * self.bits // 8

    def bits_per_weight(self, block: int = 64) -> float:
        """Return what a weight of a row of whole blocks costs, its part of the scale included."""
        scales = 2 if self.offset else 1
        return self.bits + scales * SCALES.itemsize * 8 / block


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("int8", 8),
        Kind("nf4", 4, codebook=NF4),
        Kind("int4", 4, offset=True),
        Kind("int3", 3, offset=True),
        Kind("int2", 2, offset=True),
    )
}


def kind_named(name: str) -> Kind:
    """Return the kind of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {name!r}")
    return KINDS[name]

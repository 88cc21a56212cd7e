"""Where the numbers of a tensor on disk belong in an expert's slice of a stack, kept small.

A `names.Part` lists the position of every number, as much memory as the slice itself. Nearly
always they follow one stride a dimension (halves, transposes); then the strides are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from esft.names import Part


@dataclass(frozen=True)
class Place:
    """A part of an expert, as `names.Part`, without the list of its numbers where that can be.

    Attributes:
        names: as `Part.names`.
        fused: as `Part.fused`.
        each: as `Part.each`.
        shape: of one expert's share of the tensor on disk.
        stride: by which its numbers lie in the expert's flattened slice, from `offset` on; None
            where they follow no strides.
        offset: of the first number.
        numbers: of all, where there is no stride.
    """

    names: tuple[str, ...]
    fused: bool
    each: int | None
    shape: torch.Size
    stride: tuple[int, ...] | None
    offset: int
    numbers: Tensor | None

    @classmethod
    def of(cls, part: Part) -> Self:
        """Describe a part. `part.turned` has been called where that is needed."""
        numbers = part.numbers
        offset = int(numbers.reshape(-1)[0])
        stride = tuple(
            int(numbers.select(d, 1).reshape(-1)[0]) - offset if size > 1 else 0
            for d, size in enumerate(numbers.shape)
        )
        regular = torch.full((), offset, dtype=torch.int64)
        for d, step in enumerate(stride):
            along = [1] * numbers.dim()
            along[d] = -1
            regular = regular + (torch.arange(numbers.shape[d]) * step).view(along)
        if torch.equal(regular, numbers):
            return cls(part.names, part.fused, part.each, numbers.shape, stride, offset, None)
        return cls(part.names, part.fused, part.each, numbers.shape, None, offset, numbers)

    def name(self, expert: int) -> str:
        """Return the name of the tensor that holds this expert."""
        return self.names[0] if self.fused else self.names[expert]

    def write(self, expert_slice: Tensor, value: Tensor) -> None:
        """Put this part into an expert's contiguous slice `[...]`, in place, cast to its dtype.

        Args:
            expert_slice: `[...]`.
            value: the tensor on disk, or the expert's share of it: of as many numbers as `shape`.
        """
        flat = expert_slice.view(-1)
        if self.stride is None:
            assert self.numbers is not None
            flat[self.numbers.reshape(-1)] = value.reshape(-1).to(flat)
        else:
            # Of the flat slice, not of its storage: it may be one of a stack's.
            place = flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)
            place.copy_(value.view(self.shape))

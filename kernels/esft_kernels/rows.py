"""The routed rows of the Triton path: sorted by slot, and cut into tiles of one expert each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ELSEWHERE = -1
"""In `Rows.place`: the row's expert is held elsewhere."""
NO_EXPERT = -2
"""In `Rows.place`: the row's id names no expert."""


@dataclass(frozen=True)
class Rows:
    """All routed rows by slot. Every shape is known on the host, so that a GPU is not waited for.

    Attributes:
        flat: `[N]` int32, position of each sorted row in the flattened `[T*K]` routing. Rows
            without an expert come last, behind `offsets[S]`.
        token: `[N]` int32, the token that each sorted row is a copy of.
        place: `[T, K]` int32, the sorted row of each routed one, or `ELSEWHERE` or `NO_EXPERT`.
        offsets: `[S + 1]` int32; slot s has the sorted rows `offsets[s]` to `offsets[s + 1]`.
        tile_slot: `[tiles]` int32, the slot of each tile, ascending; S for a tile without rows.
            There are as many tiles as the most uneven routing needs: `ceil(N / block_m) + S`.
        tile_row: `[tiles]` int32, the first row of each tile.
        block_m: rows of a tile; a slot's last tile may have fewer.
    """

    flat: Tensor
    token: Tensor
    place: Tensor
    offsets: Tensor
    tile_slot: Tensor
    tile_row: Tensor
    block_m: int

    @property
    def num_slots(self) -> int:
        """How many experts both banks have together: S."""
        return self.offsets.shape[0] - 1

    @property
    def num_tiles(self) -> int:
        """How many tiles the list has, those without rows included."""
        return self.tile_slot.shape[0]


def tile_bound(rows: int, num_slots: int, block_m: int) -> int:
    """Return the most tiles that any routing of so many rows needs."""
    return -(-rows // block_m) + min(num_slots, rows)

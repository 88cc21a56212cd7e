"""Which experts a delta changes, and their values, whether its tensors hold one expert or all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esft.delta import Delta

if TYPE_CHECKING:
    from torch import Tensor

    from esft.names import Part


def held_experts(part: Part, delta: Delta) -> list[int]:
    """Return the experts whose numbers of a part a delta has."""
    if not part.fused:
        return [expert for expert, name in enumerate(part.names) if name in delta.entries]
    (name,) = part.names
    if name not in delta.entries:
        return []
    rows = delta.rows.get(name) or range(delta.entries[name].shape[0])
    each = part.each or 1
    return [row // each for row in rows if row % each == 0]


def value_of(part: Part, delta: Delta, expert: int) -> Tensor:
    """Read an expert's numbers of a part; the delta's values are not coded."""
    value = delta.tensor(part.name(expert))
    if not part.fused:
        return value
    first = part.rows([expert])[0]
    rows = delta.rows.get(part.name(expert))
    return part.cut(value, first if rows is None else rows.index(first))

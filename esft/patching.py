"""Which bytes of a base's tensors one or several deltas replace, and with what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from esft.delta import Delta
from esft.errors import DeltaError
from esft.shards import Entry, read_blocks

ON_CONFLICT = ("error", "last", "mean")


@dataclass(frozen=True)
class Patch:
    """New bytes for a part of a tensor: the whole of it, or one row.

    Attributes:
        start: first byte within the tensor.
        end: byte after the last.
        sources: tensor of a delta, and first byte within it; more than one are averaged.
    """

    start: int
    end: int
    sources: tuple[tuple[Entry, int], ...]

    def blocks(self) -> Iterator[bytes]:
        """Yield the new bytes, a few megabytes at a time."""
        size = self.end - self.start
        pieces = [read_blocks(entry, first, first + size) for entry, first in self.sources]
        if len(pieces) == 1:
            yield from pieces[0]
            return
        from esft.tensors import mean_bytes  # needs torch, which merging otherwise does without

        for blocks in zip(*pieces, strict=True):
            yield mean_bytes(list(blocks), self.sources[0][0].dtype)


def patches(
    deltas: Sequence[Delta], base: dict[str, Entry], on_conflict: str = "error"
) -> dict[str, list[Patch]]:
    """Return what changes in each tensor of a base, in the order of its bytes.

    Two deltas conflict where both replace the same tensor, or the same row of a tensor that holds
    all experts, with different values. What only one touches never conflicts.

    Args:
        deltas: of one base, uncoded (see `Delta.plain`), no adapters.
        base: the base's tensors by name.
        on_conflict: `error`; `last`, the last delta wins; or `mean`, the values' average.

    Raises:
        DeltaError: deltas conflict and may not, or `on_conflict` is none of these.
    """
    if on_conflict not in ON_CONFLICT:
        raise DeltaError(f"--on-conflict {on_conflict}: choose one of {', '.join(ON_CONFLICT)}")
    found: dict[str, list[Patch]] = {}
    for name in sorted({name for delta in deltas for name in delta.entries}):
        holders = [delta for delta in deltas if name in delta.entries]
        # Whole tensors and rows are compared row by row.
        by_row = any(name in delta.rows for delta in holders)
        claims: dict[int, list[tuple[Delta, int]]] = {}
        for delta in holders:
            for place, row in enumerate(_rows(delta, name, by_row)):
                claims.setdefault(row, []).append((delta, place))
        count = base[name].shape[0] if by_row else 1
        size = (base[name].end - base[name].start) // count
        for row, claimants in sorted(claims.items()):
            sources = _agree(
                [(delta, delta.entries[name], place * size) for delta, place in claimants],
                size,
                f"{name}, row {row}" if by_row else name,
                on_conflict,
            )
            found.setdefault(name, []).append(Patch(row * size, (row + 1) * size, sources))
    return found


def patched_blocks(base: Entry, changes: Iterable[Patch]) -> Iterator[bytes]:
    """Yield the bytes that a base tensor has after its changes."""
    place = 0
    for patch in changes:
        yield from read_blocks(base, place, patch.start)
        yield from patch.blocks()
        place = patch.end
    yield from read_blocks(base, place, base.end - base.start)


def _rows(delta: Delta, name: str, by_row: bool) -> Sequence[int]:
    if name in delta.rows:
        return delta.rows[name]
    return range(delta.entries[name].shape[0] if by_row else 1)


def _agree(
    claims: list[tuple[Delta, Entry, int]], size: int, what: str, on_conflict: str
) -> tuple[tuple[Entry, int], ...]:
    """Return where the new bytes come from, of the deltas that want to write them."""
    sources = tuple((entry, first) for _, entry, first in claims)
    if len(claims) == 1 or on_conflict == "last":
        return sources[-1:]
    if all(_same(sources[0], other, size) for other in sources[1:]):
        return sources[:1]
    if on_conflict == "error":
        folders = " and ".join(str(delta.folder) for delta, _, _ in claims)
        raise DeltaError(
            f"{folders} conflict: both change {what}; choose --on-conflict last or mean, or merge "
            f"deltas of different experts"
        )
    return sources


def _same(one: tuple[Entry, int], other: tuple[Entry, int], size: int) -> bool:
    pieces = (read_blocks(entry, first, first + size) for entry, first in (one, other))
    return all(a == b for a, b in zip(*pieces, strict=True))

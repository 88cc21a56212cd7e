"""What batches hold between two layers: in memory, or beyond a budget in a memory-mapped file."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from esft.streaming.state_file import StateFile

_SUMMED = 1 << 20  # numbers at a time: they are widened for it
# A tensor's shape, dtype and sum of bits, as in JSON.
Digest = list[object]


class Place(Enum):
    """Where a tensor lies while it waits."""

    MEMORY = auto()
    FILE = auto()
    SHARED = auto()  # wherever another batch keeps the same


@dataclass(frozen=True)
class _Held:
    tensor: weakref.ref[Tensor]  # dead when the model has let go of it
    place: Place
    digest: Digest
    version: int  # changes with what is written into it


class Waiting:
    """The tensors that one batch holds, and where they lie.

    Attributes:
        in_memory: bytes of their storages that lie in memory and are not another batch's.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._held: dict[int, _Held] = {}
        self.in_memory = 0

    def stop(
        self,
        tensors: Sequence[Tensor],
        budget: int,
        file: StateFile | None,
        written: Mapping[int, int],
    ) -> None:
        """Take what a pass waits with, in the place of what it waited with before.

        What is new since then moves into the file if memory has no room for it. What has lain in
        one of the two stays there: nothing is written twice.

        Args:
            tensors: each once, the layer's own input first.
            budget: bytes that this batch may hold in memory.
            file: takes the rest; None keeps everything in memory.
            written: storages that the file has already: address -> place.

        Raises:
            OutputError: the file cannot be written.
        """
        borrowed = self._shared.share(tensors) if not self._held else set()
        old = {key: held for key, held in self._held.items() if held.tensor() is not None}
        storages = _by_storage(tensors)
        places = {
            address: next((old[id(view)].place for view in views if id(view) in old), None)
            for address, views in storages.items()
        }
        places |= dict.fromkeys(borrowed, Place.SHARED)
        # What lies in memory stays there, whatever else comes.
        self.in_memory = sum(
            storages[address][0].untyped_storage().nbytes()
            for address, place in places.items()
            if place is Place.MEMORY
        )
        self._held = {}
        for address, views in storages.items():
            # Before they move: what is only looked at there comes back into memory.
            digests = [_digest(view, old.get(id(view))) for view in views]
            place = places[address] or self._new(views, budget, file, written)
            for view, found in zip(views, digests, strict=True):
                self._held[id(view)] = _Held(weakref.ref(view), place, found, view._version)

    def _new(
        self,
        views: Sequence[Tensor],
        budget: int,
        file: StateFile | None,
        written: Mapping[int, int],
    ) -> Place:
        """Find a place for a storage, and let its views use it there."""
        storage = views[0].untyped_storage()
        size, address = storage.nbytes(), storage.data_ptr()
        if file is None or not size or self.in_memory + size <= budget:
            self.in_memory += size
            return Place.MEMORY
        start = written[address] if address in written else file.append(storage)
        moved = file.map(start, size)
        for view in views:
            _use(view, moved)
        return Place.FILE

    def digests(self) -> list[Digest]:
        """Return the digest of each tensor that waits."""
        return [held.digest for held in self._held.values()]


class Shared:
    """Tensors that are the same for several batches, such as the masks of a length: kept once."""

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()

    def share(self, tensors: Sequence[Tensor]) -> set[int]:
        """Let the tensors of a batch at its first stop use the storages of equal ones.

        All but the first tensor, which the layer turns into something else; the others go to every
        layer as they are.

        Returns:
            the addresses of storages that are other batches'.
        """
        borrowed = set()
        for tensor in tensors:
            if not tensor.numel() or _address(tensor) == _address(tensors[0]):
                continue
            key = f"{digest(tensor)} {tensor.stride()} {tensor.storage_offset()}"
            kept = self._kept.setdefault(key, tensor)
            if kept is not tensor and torch.equal(kept, tensor):
                _use(tensor, kept.untyped_storage())
                borrowed.add(_address(tensor))
        return borrowed


def digest(tensor: Tensor) -> Digest:
    """Return a tensor's shape, dtype and the sum of its bits, which other values hardly share."""
    once = tensor.detach()
    for dim, step in enumerate(tensor.stride()):
        if not step and once.shape[dim]:  # the same again and again, as in a mask for all heads
            once = once.narrow(dim, 0, 1)
    flat = once.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 4 * 4
    words = flat[:whole] if flat.storage_offset() % 4 == 0 else flat[:whole].clone()
    parts = [*words.view(torch.int32).split(_SUMMED), flat[whole:]]
    return [
        list(tensor.shape),
        str(tensor.dtype),
        sum(int(p.sum(dtype=torch.int64)) for p in parts),
    ]


def _digest(view: Tensor, old: _Held | None) -> Digest:
    unchanged = old is not None and old.version == view._version
    return old.digest if old is not None and unchanged else digest(view)


def _use(tensor: Tensor, storage: torch.UntypedStorage) -> None:
    tensor.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _by_storage(tensors: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_address(tensor), []).append(tensor)
    return groups


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

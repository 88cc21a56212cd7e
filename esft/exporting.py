"""A delta written once more: in the present format, compressed, or as an official adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from esft.compression import CODING, encode
from esft.copying import copy_file
from esft.delta import Delta, read_delta
from esft.delta_weights import source_of
from esft.dtypes import width
from esft.errors import DeltaError
from esft.files import new_folder, refuse_existing
from esft.fingerprint import hash_tensor
from esft.locating import resolve
from esft.manifest import STEM, write_manifest
from esft.official import write_official
from esft.report.base_card import CARD
from esft.shard_writer import SHARD_SIZE, Source, write_shards
from esft.shards import Checkpoint, open_checkpoint, read_blocks, refuse_link_outside


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        out: the folder.
        tensors: changed tensors in it.
        parameters: numbers in them.
        plain_bytes: bytes of them as the base stores them.
        bytes: bytes of them as they were written, without headers.
    """

    out: Path
    tensors: int
    parameters: int
    plain_bytes: int
    bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits that a changed number takes."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def export(
    delta: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    compress: bool = False,
    official: bool = False,
    shard_size: int = SHARD_SIZE,
) -> Export:
    """Write a delta once more; the original stays.

    Without an option: in the present format, its values as they are. That brings a delta of
    version 1 up to date and undoes `compress`.

    Args:
        delta: the delta's folder.
        out: a new folder; it appears complete or not at all.
        base: the checkpoint that the delta was made from; needed where values are or become
            coded against it.
        compress: code the values' differences from the base, without loss; `merge`, `verify`
            and whatever else reads a delta decodes them.
        official: write an adapter of the official ESFT release instead of a delta.
        shard_size: bytes of (uncoded) tensors in one file.

    Raises:
        DeltaError: the delta is damaged, is an adapter of PEFT's, `base` is needed, or the
            official format cannot express it.
        CheckError: `base` is not the delta's.
        OutputError: `out` exists, or the disk is full.
    """
    out = Path(out)
    refuse_existing(out)
    if compress and official:
        raise DeltaError("--compress and --official: the official format has no compression")
    opened = read_delta(Path(delta))
    if opened.is_adapter:
        raise DeltaError(f"{delta}: a LoRA adapter is in PEFT's own files; copy the folder")
    card = opened.folder / CARD
    refuse_link_outside(card)
    checkpoint = None
    if compress or opened.coding is not None:
        if base is None:
            raise DeltaError(f"{delta}: --base: needed to code or decode its values")
        checkpoint = open_checkpoint(resolve(base))
        opened.check_base(checkpoint, hashes=False)
    if checkpoint is None:
        _write(opened, out, None, official, shard_size, card)
    else:
        with opened.plain(checkpoint) as plain:
            _write(plain, out, checkpoint if compress else None, official, shard_size, card)
    return _counted(opened, out, "model" if official else STEM)


def _write(
    delta: Delta, out: Path, base: Checkpoint | None, official: bool, shard_size: int, card: Path
) -> None:
    """Write a delta of uncoded values; coded against `base` if it is given. `card` goes along."""
    if official:
        write_official(delta, out, shard_size=shard_size)
        return
    tensors: dict[str, dict[str, Any]] = {
        name: dict(tensor) for name, tensor in delta.manifest["tensors"].items()
    }
    with new_folder(out) as folder:
        sources = []
        for name, tensor in tensors.items():
            source = source_of(name, tensor, partial(read_blocks, delta.entries[name]))
            sources.append(source if base is None else _coded(source, delta, base))
        written = write_shards(folder, STEM, sources, limit=shard_size)
        if base is not None:
            for name, tensor in tensors.items():
                tensor["coded"] = vars(written[name])
        if card.is_file():
            copy_file(card, folder / CARD)
        coding = None if base is None else CODING
        write_manifest(folder, delta.base, delta.manifest, tensors, coding)


def _coded(source: Source, delta: Delta, base: Checkpoint) -> Source:
    entry = base.entries[source.name]

    def blocks() -> Iterator[bytes]:
        delta.check_hash(base.folder, source.name, hash_tensor(entry))
        old = delta.base_blocks(source.name, entry)
        return encode(source.blocks(), old, width(source.dtype))

    return Source(source.name, "U8", None, source.size, blocks)


def _counted(delta: Delta, out: Path, stem: str) -> Export:
    tensors = delta.manifest["tensors"].values()
    numbers = [math.prod(tensor["shape"]) for tensor in tensors]
    plain = [count * width(t["dtype"]) for count, t in zip(numbers, tensors, strict=True)]
    written = open_checkpoint(out, stem).entries.values()
    return Export(
        out=out,
        tensors=len(tensors),
        parameters=sum(numbers),
        plain_bytes=sum(plain),
        bytes=sum(entry.end - entry.start for entry in written),
    )

"""A checkpoint's safetensors files: which tensor lies where, without reading the weights."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from esft.errors import ModelError
from esft.files import read_json

STEM = "model"  # of a checkpoint's files
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"
_CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: the shard.
        dtype: safetensors' name of the dtype, `BF16`.
        shape: the tensor's shape.
        start: first byte in the file.
        end: byte after the last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model in safetensors files.

    Attributes:
        folder: where it is.
        files: its shards, in the order of their names.
        entries: name -> place of every tensor.
    """

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]

    def in_file(self, file: Path) -> list[tuple[str, Entry]]:
        """Return the tensors of one shard in the order of their bytes."""
        own = [(name, entry) for name, entry in self.entries.items() if entry.file == file]
        return sorted(own, key=lambda item: (item[1].start, item[1].end))


def open_checkpoint(folder: Path, stem: str = STEM, *, links: bool = True) -> Checkpoint:
    """Read the headers of a checkpoint's files, or of a delta's.

    Args:
        folder: where they are.
        stem: what their names begin with.
        links: whether a file may be a symbolic link to one outside the folder.

    Raises:
        ModelError: there are no safetensors files, one is missing or damaged, two hold a tensor
            of the same name, or the index points outside the folder.
    """
    files = tuple(shard_files(folder, stem))
    entries: dict[str, Entry] = {}
    for file in files:
        if not links:
            refuse_link_outside(file)
        for name, entry in read_header(file).items():
            if name in entries:
                raise ModelError(f"{file}: tensor {name} is also in {entries[name].file.name}")
            entries[name] = entry
    return Checkpoint(folder, files, entries)


def read_header(file: Path) -> dict[str, Entry]:
    """Read one safetensors file's header: name -> place.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        # The library checks lengths, overlaps and holes; the offsets it keeps to itself.
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ModelError(f"{file}: this weights file is missing") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: this weights file is damaged: {error}") from error
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: Entry(
            file,
            item["dtype"],
            tuple(item["shape"]),
            base + item["data_offsets"][0],
            base + item["data_offsets"][1],
        )
        for name, item in header.items()
    }


def read_blocks(entry: Entry, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield a tensor's bytes, or those from `start` to `end` within it, 4 MiB at a time.

    Raises:
        ModelError: the file ends within the tensor.
    """
    with open(entry.file, "rb") as file:
        file.seek(entry.start + start)
        left = entry.end - entry.start - start if end is None else end - start
        while left:
            block = file.read(min(left, _CHUNK))
            if not block:
                raise ModelError(f"{entry.file}: ends in the middle of a tensor")
            yield block
            left -= len(block)


def read_rows(entry: Entry, rows: Iterable[int]) -> Iterator[bytes]:
    """Yield the bytes of some rows (indices of the first dimension), in the order given."""
    size = (entry.end - entry.start) // entry.shape[0]
    for row in rows:
        yield from read_blocks(entry, row * size, (row + 1) * size)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # One reader may take the first of two, another the last.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def refuse_link_outside(file: Path) -> None:
    """Raise ModelError if a file is a symbolic link that leads out of its folder.

    One into the hub's cache may: that keeps the files of `snapshots/REVISION/` in `blobs/`.
    """
    folder = Path(os.path.realpath(file.parent))
    target = Path(os.path.realpath(file))
    is_cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if folder not in target.parents and not is_cached:
        raise ModelError(
            f"{file}: a symbolic link to {target}, outside the folder; put the file itself there"
        )


def shard_files(folder: Path, stem: str = STEM) -> Iterator[Path]:
    """Yield the files of a checkpoint, by name, as its index names them; they may be missing.

    Raises:
        ModelError: there is neither an index nor a single file, or the index is damaged or points
            outside the folder.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if single.is_file():
            yield single
            return
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        if pickled:
            raise ModelError(
                f"{pickled[0]}: pickled weights can run code when read and are refused; "
                f"convert the checkpoint to safetensors"
            )
        raise ModelError(f"{folder}: no {single.name} and no {index.name} in this folder")
    if single.is_file():
        raise ModelError(
            f"{folder}: holds both {single.name} and {index.name}, which may differ; transformers "
            f"reads the first; remove the one that is not meant"
        )
    try:
        names = sorted(set(read_json(index, "index", ModelError)["weight_map"].values()), key=str)
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"{index}: no weight_map in this index") from None
    if not names:
        raise ModelError(f"{index}: the weight_map is empty")
    for name in names:
        if not _is_file_name(name):
            raise ModelError(f"{index}: points outside the folder: {name!r}")
        yield folder / name


def _is_file_name(name: object) -> bool:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        return False
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False

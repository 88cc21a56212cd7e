"""Merged checkpoint -> base: the replaced bytes put back, and every tensor's hash to prove it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esft.compression import CODING, decode
from esft.copying import copy_file, copy_other_files
from esft.delta import Delta, read_delta
from esft.dtypes import width
from esft.errors import CheckError, DeltaError
from esft.files import explain_write_errors, new_folder, refuse_existing
from esft.fingerprint import fingerprint
from esft.locating import resolve
from esft.manifest import LOW_RANK
from esft.progress import SILENT, Reporter
from esft.shards import Checkpoint, Entry, open_checkpoint, read_blocks, read_rows


def unmerge(
    merged: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Path:
    """Write the base that a merged checkpoint was made from, its weights bit for bit.

    What the delta replaced comes from the base's own tensors, or, where the delta is compressed,
    from the difference that it holds. Configuration and tokenizer are copied; the base's model card
    is gone, since the merge wrote its own.

    Args:
        merged: the merged checkpoint's folder.
        delta: the delta that was merged.
        out: a new folder; it appears complete or not at all.
        base: a checkpoint that has the replaced tensors, or None if the delta is compressed.
        reporter: told of progress.

    Returns:
        `out`.

    Raises:
        CheckError: the checkpoint is not a merge of this delta, or the base is another one.
        DeltaError: the delta is damaged, or does not hold what is needed.
        OutputError: `out` exists, or the disk is full.
    """
    folder, out = resolve(merged), Path(out)
    refuse_existing(out)
    opened = read_delta(Path(delta))
    if opened.is_adapter:
        raise DeltaError(f"{delta}: a LoRA adapter's merge is computed, and cannot be undone")
    if base is None and opened.coding != CODING:
        held = "low-rank factors" if opened.coding == LOW_RANK else "the final values"
        raise DeltaError(
            f"{delta}: holds {held} only, not what they replaced; give --base BASE, or "
            f"the delta as `esft export --compress` wrote it"
        )
    checkpoint = open_checkpoint(folder)
    originals = None if base is None else open_checkpoint(resolve(base))
    opened.check_base(checkpoint, hashes=False)  # it has the base's names, dtypes and shapes
    with new_folder(out) as target:
        copy_other_files(folder, target)
        (target / "README.md").unlink(missing_ok=True)
        size = sum(file.stat().st_size for file in checkpoint.files)
        with reporter.task("unmerge", size, "byte") as task:
            for file in checkpoint.files:
                copy = target / file.name
                copy_file(file, copy, task.advance)
                for name, entry in checkpoint.in_file(file):
                    if name in opened.manifest["tensors"]:
                        _put_back(opened, name, entry, originals, copy)
        _check(opened, folder, open_checkpoint(target))
    return out


def _put_back(
    delta: Delta, name: str, entry: Entry, originals: Checkpoint | None, copy: Path
) -> None:
    """Write what a delta replaced in one tensor into the copy of its file."""
    rows = delta.rows.get(name)
    if originals is not None:
        if name not in originals.entries:
            raise CheckError(f"{originals.folder}: tensor {name} is missing from it")
        old = originals.entries[name]
        if (old.dtype, old.shape) != (entry.dtype, entry.shape):
            raise CheckError(f"{originals.folder}: tensor {name} is of another dtype or shape")
        blocks = read_blocks(old) if rows is None else read_rows(old, rows)
    else:
        blocks = _undone(delta, name, entry)
    size = (entry.end - entry.start) // (entry.shape[0] if rows is not None else 1)
    places = [0] if rows is None else [row * size for row in rows]
    with explain_write_errors(copy), open(copy, "r+b") as target:
        for place, piece in _by_place(blocks, places, size):
            target.seek(entry.start + place)
            target.write(piece)


def _undone(delta: Delta, name: str, entry: Entry) -> Iterator[bytes]:
    """Yield what a compressed delta's values replaced."""
    rows = delta.rows.get(name)
    final = read_blocks(entry) if rows is None else read_rows(entry, rows)
    try:
        yield from decode(
            read_blocks(delta.entries[name]), final, width(entry.dtype), backwards=True
        )
    except ValueError as error:
        raise DeltaError(f"{delta.folder}: tensor {name}: {error}") from None


def _by_place(blocks: Iterator[bytes], places: list[int], size: int) -> Iterator[tuple[int, bytes]]:
    """Cut a stream of rows into pieces that lie together, with the place of each."""
    row, done = 0, 0
    for block in blocks:
        start = 0
        while start < len(block):
            piece = block[start : start + size - done]
            yield places[row] + done, piece
            start += len(piece)
            done += len(piece)
            if done == size:
                row, done = row + 1, 0


def _check(delta: Delta, merged: Path, result: Checkpoint) -> None:
    """Check that every tensor is the base's; where one is not, say whose fault it is."""
    for name, tensor in fingerprint(result).items():
        if tensor["sha256"] == delta.base[name]["sha256"]:
            continue
        if name not in delta.manifest["tensors"]:
            raise CheckError(
                f"{merged}: tensor {name} is not the base's, and the delta did not change "
                f"it; another delta may be merged into this checkpoint too"
            )
        raise CheckError(
            f"{merged}: tensor {name}: what was put back is not the base's; this delta was "
            f"not merged into it, or another delta was too, or the base given is another one"
        )

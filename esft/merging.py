"""Deltas + base -> checkpoint: a copy of the base's files in which the changed bytes are replaced.

A changed tensor has the dtype and shape that it has in the base, so every file keeps its header
and its layout, and merging is copying bytes: a few megabytes of memory whatever the model's size,
tensors that transformers ignores are kept, and nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from esft.copying import copy_file, copy_other_files
from esft.delta import Delta, attach_delta, read_delta
from esft.errors import CheckError, DeltaError
from esft.files import explain_write_errors, new_folder, refuse_existing, write_text
from esft.fingerprint import hash_tensor
from esft.locating import resolve
from esft.patching import Patch, patched_blocks, patches
from esft.progress import SILENT, Reporter
from esft.report.merged_card import merged_card
from esft.shards import INDEX, Checkpoint, open_checkpoint

Deltas = str | Path | Sequence[str | Path]

_THREADS = 2  # that hash the base while its files are copied


@dataclass(frozen=True)
class Verification:
    """What `verify` checked.

    Attributes:
        tensors: tensors of the base that were hashed.
        changed: tensors that the delta replaces, whole or in part.
        merged: tensors of the merged checkpoint that were compared, or None if none was given.
    """

    tensors: int
    changed: int
    merged: int | None = None


def merge(
    base: str | Path,
    delta: Deltas,
    out: str | Path,
    *,
    on_conflict: str = "error",
    reporter: Reporter = SILENT,
) -> Path:
    """Write the checkpoint that results from applying one or several deltas to their base.

    The base is checked against the deltas' fingerprint, every tensor, while it is copied.

    Args:
        base: the checkpoint that the deltas were made from: folder, hub id or `tiny-moe`.
        delta: a delta's folder, or several.
        out: a new folder; it appears complete or not at all.
        on_conflict: what to do where deltas change the same expert: `error`; `last`, the last
            delta wins; `mean`, the average of their values.
        reporter: told of progress.

    Returns:
        `out`.

    Raises:
        CheckError: a delta was made from another base; the message names a tensor.
        DeltaError: a delta is damaged, or deltas conflict.
        OutputError: `out` exists, or the disk is full.
    """
    source, out = resolve(base), Path(out)
    refuse_existing(out)
    opened = _read(delta)
    checkpoint = open_checkpoint(source)
    for one in opened:
        one.check_base(checkpoint, hashes=False)
    with _plain(opened, checkpoint) as plain, new_folder(out) as folder:
        copy_other_files(source, folder)
        if opened[0].is_adapter:
            _merge_adapter(source, opened[0], folder)
            changed = 0
        else:
            changes = patches(plain, checkpoint.entries, on_conflict)
            _write_merged(checkpoint, opened, changes, folder, reporter)
            changed = len(changes)
        write_text(folder / "README.md", merged_card(base, source, opened, changed))
    return out


def verify(
    base: str | Path,
    delta: Deltas,
    merged: str | Path | None = None,
    *,
    on_conflict: str = "error",
) -> Verification:
    """Check that deltas are whole and fit a base, and that a merged checkpoint is their merge.

    Every tensor is compared byte by byte.

    Args:
        base: see `merge`; `delta` and `on_conflict` likewise.
        merged: the merged checkpoint, or None to check base and deltas alone.

    Raises:
        CheckError: the base is another one, or the merged checkpoint differs; names a tensor.
        DeltaError: a delta is damaged, or is an adapter and `merged` was given.
    """
    opened = _read(delta)
    checkpoint = open_checkpoint(resolve(base))
    for one in opened:
        one.check_base(checkpoint)
    changed = len({name for one in opened for name in one.manifest["tensors"]})
    if merged is None:
        return Verification(len(checkpoint.entries), changed)
    if opened[0].is_adapter:
        raise DeltaError(
            f"{opened[0].folder}: an adapter's merge is computed, not copied; cannot compare it"
        )
    result = open_checkpoint(Path(merged))
    check_layout(checkpoint, result)
    with _plain(opened, checkpoint) as plain:
        changes = patches(plain, checkpoint.entries, on_conflict)
        for name, entry in checkpoint.entries.items():
            wanted = sha256()
            for block in patched_blocks(entry, changes.get(name, [])):
                wanted.update(block)
            if wanted.hexdigest() != hash_tensor(result.entries[name]):
                raise CheckError(f"{merged}: tensor {name} is not what base and delta give")
    return Verification(len(checkpoint.entries), changed, len(result.entries))


def check_layout(base: Checkpoint, merged: Checkpoint) -> None:
    """Raise CheckError unless both checkpoints have the same tensors, dtypes and shapes."""
    for name in sorted(base.entries.keys() ^ merged.entries.keys()):
        where = merged.folder if name in base.entries else base.folder
        raise CheckError(f"{where}: tensor {name} is missing")
    for name, entry in base.entries.items():
        other = merged.entries[name]
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            raise CheckError(
                f"{merged.folder}: tensor {name} is {other.dtype} {list(other.shape)}, "
                f"{entry.dtype} {list(entry.shape)} in the base"
            )


def write_patches(folder: Path, checkpoint: Checkpoint, changes: dict[str, list[Patch]]) -> None:
    """Replace bytes in a copy of a checkpoint's files.

    Args:
        folder: has the copied files.
        checkpoint: what they are copies of.
        changes: by tensor.

    Raises:
        OutputError: the disk is at fault.
    """
    for file in checkpoint.files:
        tensors = [item for item in checkpoint.in_file(file) if item[0] in changes]
        if not tensors:
            continue
        copy = folder / file.name
        with explain_write_errors(copy), open(copy, "r+b") as target:
            for name, entry in tensors:
                for patch in changes[name]:
                    target.seek(entry.start + patch.start)
                    for block in patch.blocks():
                        target.write(block)


def _read(delta: Deltas) -> list[Delta]:
    """Open one or several deltas of one base."""
    several = [delta] if isinstance(delta, str | Path) else list(delta)
    if not several:
        raise DeltaError("no delta to merge")
    opened = [read_delta(Path(folder)) for folder in several]
    if len(opened) > 1:
        for one in opened:
            if one.is_adapter:
                raise DeltaError(
                    f"{one.folder}: a LoRA adapter cannot be merged together with other deltas"
                )
    return opened


@contextmanager
def _plain(deltas: Sequence[Delta], base: Checkpoint) -> Iterator[list[Delta]]:
    """Yield deltas with uncoded values."""
    with ExitStack() as stack:
        yield [stack.enter_context(delta.plain(base)) for delta in deltas]


def _write_merged(
    checkpoint: Checkpoint,
    deltas: Sequence[Delta],
    changes: dict[str, list[Patch]],
    folder: Path,
    reporter: Reporter,
) -> None:
    """Copy the base's shards and replace what changed, while other threads hash the base."""
    size = sum(file.stat().st_size for file in checkpoint.files)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        reporter.task("merge", size, "byte") as task,
    ):
        hashes: dict[str, Future[str]] = {
            name: pool.submit(hash_tensor, entry)
            for file in checkpoint.files
            for name, entry in checkpoint.in_file(file)
        }
        try:
            for file in checkpoint.files:
                copy_file(file, folder / file.name, task.advance)
            write_patches(folder, checkpoint, changes)
            for name, digest in hashes.items():
                for delta in deltas:
                    delta.check_hash(checkpoint.folder, name, digest.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _merge_adapter(source: Path, delta: Delta, folder: Path) -> None:
    from esft.loading import load_model  # needs torch, which merging otherwise does without

    model = attach_delta(load_model(source, device="cpu", dtype="checkpoint"), source, delta.folder)
    (folder / INDEX).unlink(missing_ok=True)  # of the base's files, which are cut anew
    with explain_write_errors(folder):
        model.save_pretrained(folder)

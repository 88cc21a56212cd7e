"""Delta + base -> checkpoint: a copy of the base's files in which the changed bytes are replaced.

A changed tensor has the dtype and shape that it has in the base, so every file keeps its header
and its layout, and merging is copying bytes: a few megabytes of memory whatever the model's size,
tensors that transformers ignores are kept, and nothing is rounded twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from esft.delta import Delta, attach_delta, read_delta
from esft.errors import CheckError, DeltaError
from esft.files import explain_write_errors, new_folder, refuse_existing, write_text
from esft.fingerprint import hash_tensor
from esft.loading import load_model, resolve
from esft.progress import SILENT, Reporter
from esft.shards import INDEX, Checkpoint, Entry, open_checkpoint, read_blocks

_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


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
    base: str | Path, delta: str | Path, out: str | Path, *, reporter: Reporter = SILENT
) -> Path:
    """Write the checkpoint that results from applying a delta to its base.

    The base is checked against the delta's fingerprint, every tensor, while it is copied.

    Args:
        base: the checkpoint that the delta was made from: folder, hub id or `tiny-moe`.
        delta: the delta's folder.
        out: a new folder; it appears complete or not at all.
        reporter: told of progress.

    Returns:
        `out`.

    Raises:
        CheckError: the delta was made from another base; the message names a tensor.
        DeltaError: the delta is damaged.
        OutputError: `out` exists, or the disk is full.
    """
    source, out = resolve(base), Path(out)
    refuse_existing(out)
    opened = read_delta(Path(delta))
    checkpoint = open_checkpoint(source)
    opened.check_base(checkpoint, hashes=False)
    with opened.plain(checkpoint) as plain, new_folder(out) as folder:
        _copy_other_files(source, folder)
        if opened.is_adapter:
            _merge_adapter(source, opened, folder)
        else:
            size = sum(entry.end - entry.start for entry in checkpoint.entries.values())
            with reporter.task("merge", size, "byte") as task:
                for file in checkpoint.files:
                    for written in _merge_file(checkpoint, file, plain, folder / file.name):
                        task.advance(written)
        write_text(folder / "README.md", _card(base, opened))
    return out


def verify(base: str | Path, delta: str | Path, merged: str | Path | None = None) -> Verification:
    """Check that a delta is whole and fits a base, and that a merged checkpoint is their merge.

    Every tensor is compared byte by byte.

    Raises:
        CheckError: the base is another one, or the merged checkpoint differs; names a tensor.
        DeltaError: the delta is damaged, or is an adapter and `merged` was given.
    """
    opened = read_delta(Path(delta))
    checkpoint = open_checkpoint(resolve(base))
    opened.check_base(checkpoint)
    counted = Verification(len(checkpoint.entries), len(opened.entries))
    if merged is None:
        return counted
    if opened.is_adapter:
        raise DeltaError(f"{delta}: an adapter's merge is computed, not copied; cannot compare it")
    result = open_checkpoint(Path(merged))
    check_layout(checkpoint, result)
    with opened.plain(checkpoint) as plain:
        for name, entry in checkpoint.entries.items():
            wanted = sha256()
            for block in _merged_blocks(entry, plain, name):
                wanted.update(block)
            if wanted.hexdigest() != hash_tensor(result.entries[name]):
                raise CheckError(f"{merged}: tensor {name} is not what base and delta give")
    return Verification(counted.tensors, counted.changed, len(result.entries))


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


def _merge_file(checkpoint: Checkpoint, file: Path, delta: Delta, out: Path) -> Iterator[int]:
    """Copy one shard, replacing changed bytes and checking the base's; yield bytes of tensors."""
    size = file.stat().st_size
    with explain_write_errors(out, needed=size), open(out, "wb") as target:
        tensors = checkpoint.in_file(file)
        with open(file, "rb") as source:
            target.write(source.read(tensors[0][1].start if tensors else size))
        for name, entry in tensors:
            digest = sha256()
            for block in read_blocks(entry):
                digest.update(block)
                if name not in delta.entries:
                    target.write(block)
            delta.check_hash(checkpoint.folder, name, digest.hexdigest())
            if name in delta.entries:
                for block in _merged_blocks(entry, delta, name):
                    target.write(block)
            yield entry.end - entry.start


def _merged_blocks(entry: Entry, delta: Delta, name: str) -> Iterator[bytes]:
    """Yield the bytes that a base tensor has after the merge."""
    change = delta.entries.get(name)
    rows = delta.rows.get(name)
    if change is None:
        yield from read_blocks(entry)
    elif rows is None:
        yield from read_blocks(change)
    else:
        row_size = (entry.end - entry.start) // entry.shape[0]
        for row in range(entry.shape[0]):
            source, place = (change, rows.index(row)) if row in rows else (entry, row)
            yield from read_blocks(source, place * row_size, (place + 1) * row_size)


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy configuration and tokenizer; no weights, above all no pickled ones."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS_SUFFIXES:
            with explain_write_errors(folder / path.name, needed=path.stat().st_size):
                shutil.copyfile(path, folder / path.name)


def _merge_adapter(source: Path, delta: Delta, folder: Path) -> None:
    model = attach_delta(load_model(source, device="cpu", dtype="checkpoint"), source, delta.folder)
    (folder / INDEX).unlink(missing_ok=True)  # of the base's files, which are cut anew
    with explain_write_errors(folder):
        model.save_pretrained(folder)


def _card(base: str | Path, delta: Delta) -> str:
    return (
        f"# {delta.manifest['base'].get('name', base)}, specialised\n\n"
        f"A merge by [esft](https://arxiv.org/abs/2407.01906) of the base "
        f"`{delta.manifest['base'].get('name', base)}` and a delta trained by the method "
        f"`{delta.method}`. Of {len(delta.base)} tensors {len(delta.entries)} differ from the "
        f"base.\n\nThis is an ordinary checkpoint: load it with transformers; esft is not needed.\n"
    )

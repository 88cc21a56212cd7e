"""The delta: what training changed, as files, and the base it belongs to.

A folder with `esft_config.json` (what it is; written last), `esft_delta.safetensors` (final
weights under the base checkpoint's own tensor names, or what leads to them) and `esft_base.json`
(the sha256 of every tensor of the base). docs/delta.md describes it well enough to re-implement.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.compression import decode
from esft.delta_v1 import MANIFEST_V1, read_manifest_v1
from esft.delta_weights import (
    check_adapter,
    check_values,
    listed_weights,
    source_of,
)
from esft.dtypes import is_finite, width
from esft.errors import CheckError, DeltaError, EsftError
from esft.fingerprint import Fingerprint, check_base, check_hash, fingerprint, hash_tensor
from esft.low_rank_delta import factor_entries, low_rank_blocks
from esft.manifest import ADAPTER, BASE, LOW_RANK, MANIFEST, STEM, read_manifest, write_manifest
from esft.shard_writer import SHARD_SIZE, write_shards
from esft.shards import (
    Checkpoint,
    Entry,
    open_checkpoint,
    read_blocks,
    read_rows,
    refuse_link_outside,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from esft.changes import Changed

# torch and transformers are imported where they are needed: merging files needs neither, and they
# cost seconds and hundreds of megabytes.


@dataclass(frozen=True)
class Delta:
    """A delta on disk whose files have been checked against their hashes.

    Attributes:
        folder: where it is.
        manifest: content of `esft_config.json`; of version 1's, as it would read today.
        base: name -> `{dtype, shape, sha256}` of every tensor of the base.
        entries: name -> place of every changed tensor; empty for an adapter. Where `coding` is
            set they are coded: read them through `plain`.
        rows: name -> changed rows, for tensors that hold all experts.
        factors: name of a factor -> its place, where the values are coded as low-rank factors;
            then `entries` is empty.
    """

    folder: Path
    manifest: dict[str, Any]
    base: Fingerprint
    entries: dict[str, Entry] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    factors: dict[str, Entry] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How it was trained: `esft`, `random`, `full`, `lora` or `hot-lora`."""
        return str(self.manifest["method"])

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a PEFT adapter instead of final weights."""
        return ADAPTER in self.manifest.get("files", {})

    @property
    def coding(self) -> str | None:
        """How the values are coded, or None if they lie in `entries` as they are."""
        return self.manifest.get("coding")

    def check_base(self, base: Checkpoint, *, hashes: bool = True) -> None:
        """Check that a checkpoint is the base. See `esft.fingerprint.check_base`.

        Raises:
            CheckError: it is another one, or has this delta merged into it already.
        """
        tokenizer = self.manifest["base"].get("tokenizer")
        check_base(self.base, base, hashes=False, tokenizer=tokenizer)
        if hashes:
            for name, tensor in fingerprint(base).items():
                self.check_hash(base.folder, name, tensor["sha256"])

    def check_hash(self, folder: Path, name: str, digest: str) -> None:
        """Check one tensor of a would-be base by its hex sha256.

        Raises:
            CheckError: it is not the base's.
        """
        changed = self.manifest["tensors"].get(name, {})
        if digest == changed.get("sha256") != changed.get("base_sha256"):
            raise CheckError(
                f"{folder}: tensor {name} has the delta's values already; give the base, not a "
                f"merged checkpoint"
            )
        check_hash(self.base, folder, name, digest)

    def tensor(self, name: str) -> Tensor:
        """Read a changed tensor, or its changed rows, onto the CPU; not where they are coded.

        Raises:
            KeyError: it was not changed.
        """
        from esft.tensors import read_tensor

        assert self.coding is None, "read through `plain`"
        return read_tensor(self.entries[name])

    def base_blocks(self, name: str, base: Entry) -> Iterator[bytes]:
        """Yield those bytes of the base that a changed tensor replaces, in its order."""
        rows = self.rows.get(name)
        yield from read_blocks(base) if rows is None else read_rows(base, rows)

    @contextmanager
    def plain(self, base: Checkpoint) -> Iterator[Delta]:
        """Yield this delta with uncoded values: itself, or a decoded copy that goes afterwards.

        The copy lies in the system's folder for temporary files (set TMPDIR for another one).

        Args:
            base: the checkpoint it was made from; its names, dtypes and shapes must fit.

        Raises:
            CheckError: the base has other values.
            DeltaError: the coded values are not those that the manifest lists.
            OutputError: the disk is full.
        """
        if self.coding is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="esft-delta-") as folder:
            yield self._decoded(base, Path(folder))

    def _decoded(self, base: Checkpoint, folder: Path) -> Delta:
        tensors = {
            name: {k: value for k, value in tensor.items() if k not in ("coded", "factors")}
            for name, tensor in self.manifest["tensors"].items()
        }
        sources = []
        for name, tensor in tensors.items():
            entry = base.entries[name]
            self.check_hash(base.folder, name, hash_tensor(entry))
            sources.append(source_of(name, tensor, partial(self._decode, name, entry)))
        written = write_shards(folder, STEM, sources)
        for name, tensor in tensors.items():
            if written[name].sha256 != tensor["sha256"]:
                raise DeltaError(f"{self.folder}: tensor {name}: decoded to other values")
        manifest = {**self.manifest, "coding": None, "tensors": tensors}
        entries = open_checkpoint(folder, STEM).entries
        return replace(self, folder=folder, manifest=manifest, entries=entries, factors={})

    def _decode(self, name: str, base: Entry) -> Iterator[bytes]:
        if self.coding == LOW_RANK:
            yield from low_rank_blocks(name, self.manifest, self.factors, base, self.rows.get(name))
            return
        coded, old = read_blocks(self.entries[name]), self.base_blocks(name, base)
        try:
            for block in decode(coded, old, width(base.dtype)):
                if not is_finite(block, base.dtype):
                    raise DeltaError(f"{self.folder}: tensor {name} has NaN or infinite values")
                yield block
        except ValueError as error:
            raise DeltaError(f"{self.folder}: tensor {name}: {error}") from None


def write_delta(
    folder: Path,
    base: Fingerprint,
    changes: Iterable[Changed],
    about: Mapping[str, Any],
    *,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write changed weights, in the base's dtypes, into an existing empty folder.

    The caller makes the folder with `files.new_folder`, so that it appears complete or not at all.

    Args:
        folder: where to.
        base: fingerprint of the checkpoint that training started from.
        changes: what changed; a tensor that the base does not have is an error.
        about: what the manifest says of the run, see `esft.manifest.write_manifest`.
        shard_size: bytes of tensors in one file; above that there are several and an index.

    Raises:
        DeltaError: a change does not fit the base, or is not finite.
        OutputError: the disk is full or read-only.
    """
    from esft.changes import in_base_dtype
    from esft.tensors import tensor_blocks

    tensors: dict[str, dict[str, Any]] = {}
    sources = []
    for change in changes:
        value = in_base_dtype(change, base)
        stored = base[change.name]
        tensor: dict[str, Any] = {"dtype": stored["dtype"], "shape": list(value.shape)}
        if change.rows is not None:
            tensor["rows"] = list(change.rows)
        tensors[change.name] = tensor | {"base_sha256": stored["sha256"]}
        sources.append(source_of(change.name, tensor, partial(tensor_blocks, value)))
    for name, written in write_shards(folder, STEM, sources, limit=shard_size).items():
        tensors[name]["sha256"] = written.sha256
    write_manifest(folder, base, about, tensors)


def read_delta(folder: Path) -> Delta:
    """Open a delta and check its files against the manifest; version 1 is read as well.

    Raises:
        DeltaError: it is no delta, of a format that this version does not know, incomplete, or
            damaged.
    """
    folder = Path(folder)
    try:
        if (folder / MANIFEST).is_file():
            for name in (MANIFEST, BASE):
                refuse_link_outside(folder / name)
            manifest, base = read_manifest(folder)
            low_rank = manifest.get("coding") == LOW_RANK
            factors = factor_entries(folder, manifest) if low_rank else {}
            entries = {} if low_rank else listed_weights(folder, manifest)
        elif (folder / MANIFEST_V1).is_file():
            manifest, base, entries = read_manifest_v1(folder)
            factors = {}
        else:
            raise DeltaError(
                f"{folder}: no {MANIFEST} in this folder; not a delta, or an unfinished one"
            )
        rows = {
            name: tuple(tensor["rows"])
            for name, tensor in manifest["tensors"].items()
            if "rows" in tensor
        }
        delta = Delta(folder, manifest, base, entries, rows, factors)
        if delta.is_adapter:
            check_adapter(folder)
        check_values(manifest, entries)
    except DeltaError:
        raise
    except EsftError as error:
        raise DeltaError(str(error)) from error
    except OSError as error:
        raise DeltaError(f"{folder}: cannot read this delta: {error}") from error
    return delta


def attach_delta(model: PreTrainedModel, base_folder: Path, folder: Path) -> PreTrainedModel:
    """Load a delta's weights into a model loaded from its base, in place, and return the model.

    Raises:
        DeltaError: the delta is damaged, or the model's own weights are in few bits.
        CheckError: it was made from another base.
    """
    from esft.adapter import merge_adapter
    from esft.names import write_into
    from esft.quantising.deltas import refuse_few_bits

    delta = read_delta(folder)
    refuse_few_bits(model, delta)
    base = open_checkpoint(base_folder)
    delta.check_base(base)
    if delta.is_adapter:
        return merge_adapter(model, delta.folder)
    with delta.plain(base) as plain:
        values = {name: plain.tensor(name) for name in plain.entries}
        write_into(model, values, plain.rows)
    return model

"""The delta format: what training changed, as files, and the base it belongs to.

A folder with `delta.json` (what it is; written last), `delta.safetensors` (final weights under the
base checkpoint's own tensor names) and `base.json` (the sha256 of every tensor of the base).
docs/delta-format.md describes it well enough to re-implement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esft.adapter import merge_adapter
from esft.errors import DeltaError, EsftError
from esft.experts import attached_layers
from esft.files import explain_write_errors, read_json, sha256_file, write_json
from esft.fingerprint import Fingerprint, check_base
from esft.names import parts, write_into
from esft.shards import Entry, open_checkpoint, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "esft-delta/1"
MANIFEST = "delta.json"
WEIGHTS = "delta.safetensors"
BASE = "base.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Changed:
    """One changed tensor of the base.

    Attributes:
        name: its name in the base checkpoint.
        value: the new weights; the whole tensor, or the changed rows where `rows` is given.
        rows: which rows of the base's tensor `value` holds, where experts are fused on disk.
    """

    name: str
    value: Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Delta:
    """A delta on disk whose files have been checked against their hashes.

    Attributes:
        folder: where it is.
        manifest: content of `delta.json`.
        base: name -> `{dtype, shape, sha256}` of every tensor of the base.
        entries: name -> place of every changed tensor; empty for an adapter.
        rows: name -> changed rows, for tensors that hold all experts.
    """

    folder: Path
    manifest: dict[str, Any]
    base: Fingerprint
    entries: dict[str, Entry] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How it was trained: `esft`, `random`, `full` or `lora`."""
        return str(self.manifest["method"])

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a PEFT adapter instead of final weights."""
        return ADAPTER in self.manifest["files"]


def expert_changes(model: PreTrainedModel) -> list[Changed]:
    """Collect the trained experts of a model that has a selection attached, in their own dtype.

    Raises:
        ModelError: no selection is attached, or the checkpoint's layout cannot be addressed.
    """
    changes = []
    for attached in attached_layers(model):
        selected = attached.banks.selected
        if not selected:
            continue
        for name, bank in attached.banks.trainable.items():
            shape = torch.Size([attached.layer.num_experts, *bank.shape[1:]])
            values = bank.detach()
            for part in parts(model, f"{attached.layer.name}.{name}", shape):
                pieces = [part.read(values[slot]) for slot in range(len(selected))]
                if part.fused:
                    changes.append(Changed(part.names[0], torch.stack(pieces), tuple(selected)))
                else:
                    changes += [
                        Changed(part.name(expert), piece)
                        for expert, piece in zip(selected, pieces, strict=True)
                    ]
    return changes


def write_delta(
    folder: Path,
    base: Fingerprint,
    changes: Iterable[Changed],
    about: Mapping[str, Any],
) -> None:
    """Write changed weights, in the base's dtypes, into an existing empty folder.

    The caller makes the folder with `files.new_folder`, so that it appears complete or not at all.

    Args:
        folder: where to.
        base: fingerprint of the checkpoint that training started from.
        changes: what changed; a tensor that the base does not have is an error.
        about: what the manifest says of the run: `method`, what names the base to a reader
            (`base`: name, model_type, architecture), and any more keys.

    Raises:
        DeltaError: a change does not fit the base, or is not finite.
        OutputError: the disk is full or read-only.
    """
    tensors: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    for change in changes:
        tensors[change.name] = _in_base_dtype(change, base)
        if change.rows is not None:
            rows[change.name] = list(change.rows)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with explain_write_errors(folder / WEIGHTS, needed=size):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_manifest(folder, base, {**about, "rows": rows})


def write_manifest(folder: Path, base: Fingerprint, about: Mapping[str, Any]) -> None:
    """Write `base.json`, then `delta.json` with the hash of every file in the folder.

    Args:
        folder: holds the delta's other files already.
        base: fingerprint of the checkpoint that training started from.
        about: see `write_delta`.

    Raises:
        OutputError: the disk is full or read-only.
    """
    write_json(folder / BASE, {"format": "esft-base/1", "tensors": base})
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "format": FORMAT,
        **about,
        "base": {**about.get("base", {}), "tensors": len(base)},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
        },
    }
    write_json(folder / MANIFEST, manifest)


def read_delta(folder: Path) -> Delta:
    """Open a delta and check its files against the manifest.

    Raises:
        DeltaError: it is no delta, of a format that this version does not know, incomplete, or
            damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise DeltaError(
            f"{folder}: no {MANIFEST} in this folder; not a delta, or an unfinished one"
        )
    try:
        delta = _open(folder)
        _check_fits(delta)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DeltaError(f"{folder / MANIFEST}: incomplete or of the wrong shape") from error
    except EsftError as error:
        raise DeltaError(str(error)) from error
    _check_finite(delta)
    return delta


def attach_delta(model: PreTrainedModel, base_folder: Path, folder: Path) -> PreTrainedModel:
    """Load a delta's weights into a model loaded from its base, in place, and return the model.

    Raises:
        DeltaError: the delta is damaged.
        CheckError: it was made from another base.
    """
    delta = read_delta(folder)
    check_base(delta.base, open_checkpoint(base_folder))
    if delta.is_adapter:
        return merge_adapter(model, delta.folder)
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        write_into(model, {name: weights.get_tensor(name) for name in delta.entries}, delta.rows)
    return model


def check_changes(changes: Iterable[Changed], base: Fingerprint) -> None:
    """Check that changes can be written as a delta of a base: before training, not after it.

    Raises:
        DeltaError: the base has no such tensor, or it is of another shape or quantised.
    """
    for change in changes:
        _base_dtype(change, base)


def _base_dtype(change: Changed, base: Fingerprint) -> torch.dtype:
    stored = base.get(change.name)
    if stored is None:
        raise DeltaError(f"tensor {change.name} was trained but is not in the base")
    if stored["dtype"] not in _TORCH_DTYPES:
        raise DeltaError(
            f"tensor {change.name} is stored as {stored['dtype']} in the base; a delta for "
            f"quantised weights cannot be written"
        )
    shape = list(stored["shape"])
    if change.rows is not None:
        shape[0] = len(change.rows)
    if list(change.value.shape) != shape:
        raise DeltaError(
            f"tensor {change.name} has shape {list(change.value.shape)}, "
            f"{shape} is expected in the base"
        )
    return _TORCH_DTYPES[stored["dtype"]]


def _in_base_dtype(change: Changed, base: Fingerprint) -> Tensor:
    value = change.value.to(_base_dtype(change, base)).cpu().contiguous()
    if not torch.isfinite(value).all():
        raise DeltaError(f"tensor {change.name} has NaN or infinite values; training diverged")
    return value


def _open(folder: Path) -> Delta:
    manifest = read_json(folder / MANIFEST, "manifest")
    if manifest.get("format") != FORMAT:
        raise DeltaError(
            f"{folder / MANIFEST}: format is {manifest.get('format')!r}, expected {FORMAT!r}"
        )
    _check_files(folder, manifest["files"])
    base = read_json(folder / BASE, "file")["tensors"]
    about = (manifest["method"], str), (manifest["base"], dict), (base, dict)
    if not all(isinstance(value, kind) for value, kind in about):
        raise TypeError
    if ADAPTER in manifest["files"]:
        return Delta(folder, manifest, base)
    return Delta(
        folder,
        manifest,
        base,
        read_header(folder / WEIGHTS),
        {name: tuple(ids) for name, ids in manifest["rows"].items()},
    )


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    # Without its safetensors file PEFT would look for an adapter in a pickle.
    weights = ADAPTER_WEIGHTS if ADAPTER in files else WEIGHTS
    for name in (BASE, weights):
        if name not in files:
            raise DeltaError(f"{folder / MANIFEST}: {name} is not listed under files")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name:
            raise DeltaError(f"{folder / MANIFEST}: points outside the folder: {name!r}")
        if not path.is_file():
            raise DeltaError(f"{path}: this file of the delta is missing")
        if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise DeltaError(f"{path}: damaged: its sha256 is not the one in {MANIFEST}")


def _check_fits(delta: Delta) -> None:
    """Check every changed tensor against the base's description that travels with the delta."""
    unknown = sorted(set(delta.rows) - set(delta.entries))
    if unknown:
        raise DeltaError(f"{delta.folder}: rows are listed for {unknown[0]}, which is not there")
    for name, entry in delta.entries.items():
        base = delta.base.get(name)
        if base is None:
            raise DeltaError(f"{delta.folder}: tensor {name} is not in the base")
        shape = list(base["shape"])
        if name in delta.rows:
            rows = delta.rows[name]
            if len(set(rows)) != len(rows) or not all(
                type(row) is int and 0 <= row < shape[0] for row in rows
            ):
                raise DeltaError(f"{delta.folder}: tensor {name}: rows out of range: {list(rows)}")
            shape[0] = len(rows)
        if entry.dtype != base["dtype"] or list(entry.shape) != shape:
            raise DeltaError(
                f"{delta.folder}: tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"{base['dtype']} {shape} is expected"
            )


def _check_finite(delta: Delta) -> None:
    file = delta.folder / (ADAPTER_WEIGHTS if delta.is_adapter else WEIGHTS)
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if not torch.isfinite(weights.get_tensor(name)).all():
                raise DeltaError(f"{delta.folder}: tensor {name} has NaN or infinite values")

"""Adapters of the official ESFT release (github.com/deepseek-ai/ESFT), read and written.

A folder with `expert_cfg.json` (`experts`: layer -> ids; `shared_experts`; `non_expert_modules`)
and safetensors files of any names, which hold exactly the tensors that these say, under the base
checkpoint's own names. Early releases left out the leading `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from esft.delta import Delta, read_delta
from esft.delta_weights import check_values, some_names, source_of
from esft.errors import DeltaError, EsftError, ModelError, SelectionError
from esft.files import new_folder, read_json, refuse_existing, write_json
from esft.fingerprint import fingerprint, tokenizer_digest
from esft.locating import resolve
from esft.manifest import STEM, check_fits, write_manifest
from esft.selection import Selection
from esft.shard_writer import SHARD_SIZE, write_shards
from esft.shards import Entry, open_checkpoint, read_blocks, read_header, refuse_link_outside

CONFIG = "expert_cfg.json"
_STEM = "model"
_ROUTED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?experts\.(\d+)\.")
_SHARED = re.compile(r"(?:^|\.)shared_(?:experts?(?:_gate)?|mlp)\.")


def import_official(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    shard_size: int = SHARD_SIZE,
) -> Delta:
    """Turn an official ESFT adapter into a delta.

    Args:
        adapter: its folder.
        base: the checkpoint that it was trained from: folder, hub id or `tiny-moe`.
        out: the delta's folder; new. It appears complete or not at all.
        config: its configuration, if it is not `expert_cfg.json` in the folder.
        shard_size: bytes of tensors in one file.

    Returns:
        The delta.

    Raises:
        DeltaError: the adapter is damaged, or has other tensors than its configuration says, or
            they do not fit the base.
        SelectionError: the configuration is damaged.
        ModelError: the base cannot be read.
        OutputError: `out` exists, or the disk is full.
    """
    adapter, out, source = Path(adapter), Path(out), resolve(base)
    refuse_existing(out)
    path = adapter / CONFIG if config is None else Path(config)
    selection = _read_config(path)
    entries = _read_entries(adapter)
    # The cheap check first: hashing a base takes minutes.
    checkpoint = open_checkpoint(source)
    _check_names(adapter, path.name, selection, entries.keys(), checkpoint.entries.keys())
    hashed = fingerprint(checkpoint)
    tensors: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        tensors[name] = {"dtype": entry.dtype, "shape": list(entry.shape)}
        check_fits(f"{entry.file}: tensor {name}", tensors[name], hashed[name])
        tensors[name]["base_sha256"] = hashed[name]["sha256"]
    check_values({"tensors": tensors}, entries)
    about = {
        "method": "esft",
        "base": {"name": str(base), "tokenizer": tokenizer_digest(source), **_family(source)},
        "selection": selection.to_dict(),
        "source": {"format": "official ESFT adapter", "folder": adapter.resolve().name},
    }
    with new_folder(out) as folder:
        sources = [
            source_of(name, tensors[name], partial(read_blocks, entry))
            for name, entry in entries.items()
        ]
        write_shards(folder, STEM, sources, limit=shard_size)
        write_manifest(folder, hashed, about, tensors)
    return read_delta(out)


def write_official(delta: Delta, out: Path, *, shard_size: int = SHARD_SIZE) -> None:
    """Write a delta as an official ESFT adapter.

    Args:
        delta: not coded.
        out: a new folder; it appears complete or not at all.
        shard_size: bytes of tensors in one file.

    Raises:
        DeltaError: the official format cannot express it: an adapter of PEFT's, experts that
            the base stores fused, or a part of an expert.
        OutputError: `out` exists, or the disk is full.
    """
    if delta.is_adapter:
        raise DeltaError(f"{delta.folder}: a LoRA adapter cannot be written in the official format")
    if delta.rows:
        raise DeltaError(
            f"{delta.folder}: tensor {min(delta.rows)} holds several experts; the official format "
            f"has one tensor per expert"
        )
    config = _config_of(delta)
    selection = Selection.from_dict(config, where=str(delta.folder))
    _check_names(delta.folder, CONFIG, selection, delta.entries.keys(), delta.base.keys())
    tensors = delta.manifest["tensors"]
    with new_folder(out) as folder:
        sources = [
            source_of(name, tensors[name], partial(read_blocks, entry))
            for name, entry in delta.entries.items()
        ]
        write_shards(folder, _STEM, sources, limit=shard_size)
        write_json(folder / CONFIG, config)


def _read_config(path: Path) -> Selection:
    try:
        return Selection.read(path)
    except SelectionError as error:
        raise SelectionError(f"{error} (an official adapter's configuration: --config)") from None


def _read_entries(adapter: Path) -> dict[str, Entry]:
    """Return the tensors of all safetensors files of a folder, as the official code reads them."""
    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise DeltaError(f"{adapter}: no safetensors file in this folder; not an official adapter")
    entries: dict[str, Entry] = {}
    try:
        for file in files:
            refuse_link_outside(file)
            for name, entry in read_header(file).items():
                full = f"model.{name}" if name.startswith("layers.") else name
                if full in entries:
                    raise DeltaError(f"{file}: tensor {full} is also in {entries[full].file.name}")
                entries[full] = entry
    except EsftError as error:
        raise DeltaError(str(error)) from error
    return entries


def _check_names(
    folder: Path, config: str, selection: Selection, found: Collection[str], base: Collection[str]
) -> None:
    """Check that a configuration names exactly the tensors that are there.

    Raises:
        DeltaError: it does not; names the tensors.
    """
    named = {name for name in base if _is_named(name, selection)}
    missing = [
        f"layer {layer} expert {expert}"
        for layer, ids in selection.experts.items()
        for expert in ids
        if not any(_expert(name) == (layer, expert) for name in named)
    ]
    if missing:
        raise DeltaError(f"{folder}: the base has no tensors of {missing[0]}, which {config} names")
    whole = (
        "; its non_expert_modules are all tensors that are no expert's, those of the routers too"
        if selection.non_expert_modules
        else ""
    )
    for names, what in (
        (named - set(found), f"not there, though {config} names what they belong to{whole}"),
        (set(found) - named, f"there, though {config} does not name what they belong to"),
    ):
        if names:
            raise DeltaError(f"{folder}: {some_names(names)}: {what}")


def _is_named(name: str, selection: Selection) -> bool:
    if expert := _expert(name):
        return expert[1] in selection.experts.get(expert[0], [])
    if _SHARED.search(name):
        return selection.shared_experts
    return selection.non_expert_modules


def _expert(name: str) -> tuple[int, int] | None:
    """Return layer and id of the routed expert that a tensor belongs to."""
    found = _ROUTED.search(name)
    return (int(found[1]), int(found[2])) if found else None


def _config_of(delta: Delta) -> dict[str, Any]:
    """Return the official configuration of a delta: every layer with experts, best first."""
    layers = {found[0] for found in map(_expert, delta.base) if found}
    experts: dict[int, list[int]] = {layer: [] for layer in sorted(layers)}
    for layer, expert in sorted({found for found in map(_expert, delta.entries) if found}):
        experts[layer].append(expert)
    for layer, ranked in _ranked(delta).items():
        if sorted(ranked) == experts.get(layer):
            experts[layer] = ranked
    others = [name for name in delta.entries if not _expert(name)]
    return {
        "experts": {str(layer): ids for layer, ids in experts.items()},
        "shared_experts": any(_SHARED.search(name) for name in others),
        "non_expert_modules": any(not _SHARED.search(name) for name in others),
    }


def _ranked(delta: Delta) -> dict[int, list[int]]:
    try:
        return Selection.from_dict(delta.manifest.get("selection")).experts
    except SelectionError:  # a full fine-tuning has none
        return {}


def _family(base: Path) -> dict[str, Any]:
    config = read_json(base / "config.json", "configuration")
    if not isinstance(config, dict):
        raise ModelError(f"{base / 'config.json'}: expected a JSON object")
    architectures = config.get("architectures") or [None]
    return {"model_type": config.get("model_type"), "architecture": architectures[0]}

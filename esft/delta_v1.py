"""Deltas of version 1 (`delta.json`), read as if they were of the present version.

Version 1 hashed its files as wholes, listed no tensors, and kept the recipe under `training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esft.errors import DeltaError
from esft.files import read_json
from esft.fingerprint import Fingerprint, fingerprint_digest
from esft.manifest import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    check_files,
    check_fits,
    check_format,
    read_base,
)
from esft.shards import Entry, read_header

MANIFEST_V1 = "delta.json"
_FORMAT = "esft-delta/1"
_WEIGHTS = "delta.safetensors"
_BASE = "base.json"


def read_manifest_v1(folder: Path) -> tuple[dict[str, Any], Fingerprint, dict[str, Entry]]:
    """Read a version-1 delta; return its manifest as of today, its base and its tensors' places.

    The manifest's `tensors` lack `sha256`: the file's own has been checked instead.

    Raises:
        DeltaError, ModelError: it is damaged or incomplete, or of another version.
    """
    path = folder / MANIFEST_V1
    manifest = read_json(path, "manifest")
    if not isinstance(manifest, dict):
        raise DeltaError(f"{path}: expected a JSON object; the file is damaged")
    if manifest.get("format") != _FORMAT:
        check_format(path, manifest.get("format"))
    files: Any = manifest.get("files")
    rows: Any = manifest.get("rows", {})  # an adapter has none
    if not isinstance(manifest.get("method"), str) or not all(
        isinstance(value, dict) for value in (manifest.get("base"), files, rows)
    ):
        raise DeltaError(f"{path}: incomplete or of the wrong shape")
    # Without its safetensors file PEFT would look for an adapter in a pickle.
    weights = ADAPTER_WEIGHTS if ADAPTER in files else _WEIGHTS
    for name in (_BASE, weights):
        if name not in files:
            raise DeltaError(f"{path}: {name} is not listed under files")
    check_files(folder, files, MANIFEST_V1)
    base = read_base(folder / _BASE)
    entries = {} if ADAPTER in files else read_header(folder / _WEIGHTS)
    tensors: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        tensor = {"dtype": entry.dtype, "shape": list(entry.shape)}
        tensors[name] = tensor | ({"rows": rows[name]} if name in rows else {})
        check_fits(f"{folder}: tensor {name}", tensors[name], base.get(name))
        tensors[name]["base_sha256"] = base[name]["sha256"]
    if unknown := sorted(set(rows) - set(entries)):
        raise DeltaError(f"{folder}: rows are listed for {unknown[0]}, which is not there")
    migrated = _migrated(manifest, tensors)
    migrated["base"]["fingerprint"] = fingerprint_digest(base)
    return migrated, base, entries


def _migrated(manifest: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kept = {key: value for key, value in manifest.items() if key not in ("rows", "files")}
    kept["base"] = dict(manifest["base"])
    training = manifest.get("training")
    if isinstance(training, dict) and "recipe" in training:
        kept["training"] = {key: value for key, value in training.items() if key != "recipe"}
        kept["recipe"] = training["recipe"]
    files = {name: item for name, item in manifest["files"].items() if name != _BASE}
    return kept | {"tensors": tensors} | ({"files": files} if ADAPTER in files else {})

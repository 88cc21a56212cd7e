"""`esft_config.json`: what a delta is, what it was made from, and what each tensor must be.

docs/delta.md describes the format. What is read here is checked for its shape; whether the
weights agree with it is for `esft.delta` to check.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import esft
from esft.compression import CODING
from esft.errors import DeltaError
from esft.files import read_json, sha256_file, write_json
from esft.fingerprint import Fingerprint, fingerprint_digest
from esft.shards import refuse_link_outside

VERSION = 2
FORMAT = f"esft-delta/{VERSION}"
BASE_FORMAT = "esft-base/2"
MANIFEST = "esft_config.json"
STEM = "esft_delta"  # of the weights: esft_delta.safetensors, or shards with an index
BASE = "esft_base.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LOW_RANK = "low-rank/1"  # the coding of factors, see `esft.low_rank_delta`
_CODINGS = (CODING, LOW_RANK)

# Kept by whoever writes a delta's content once more; the rest follows from that content.
ABOUT = ("method", "base", "adapter", "selection", "scores", "recipe", "training", "source")

_LIBRARIES = ("torch", "transformers", "safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(
    folder: Path,
    base: Fingerprint,
    about: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]] | None = None,
    coding: str | None = None,
    low_rank: Mapping[str, float] | None = None,
) -> None:
    """Write `esft_base.json`, then `esft_config.json`, into a folder that holds the weights.

    Args:
        folder: the delta's folder; the files of an adapter that are in it are listed.
        base: fingerprint of the checkpoint that training started from.
        about: what is known of the run, keys of `ABOUT`; `method` is needed, and `base` names
            the base to a reader (name, model_type, architecture, tokenizer).
        tensors: name -> dtype, shape, sha256 and the like of every changed tensor.
        coding: how the weights are coded, if they are.
        low_rank: `r` and `alpha` of factors, if the weights are coded as such.

    Raises:
        OutputError: the disk is full or read-only.
    """
    write_json(folder / BASE, {"format": BASE_FORMAT, "tensors": base})
    named = {"tensors": len(base), "fingerprint": fingerprint_digest(base)}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **{key: about[key] for key in ABOUT if key in about},
        "base": {**about.get("base", {}), **named},
        "versions": versions(),
    }
    if coding is not None:
        manifest["coding"] = coding
    if low_rank is not None:
        manifest["low_rank"] = dict(low_rank)
    if (folder / ADAPTER).is_file():
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name != BASE
        }
    manifest["tensors"] = dict(sorted((tensors or {}).items()))
    write_json(folder / MANIFEST, manifest)


def versions() -> dict[str, str]:
    """Return the versions of this program, Python and the libraries that training rests on."""
    found = {"esft": esft.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # built by hand, without metadata
            found[name] = "unknown"
    return found


def read_manifest(folder: Path) -> tuple[dict[str, Any], Fingerprint]:
    """Read and check a delta's `esft_config.json` and `esft_base.json`.

    Raises:
        DeltaError: one is missing or damaged, of another version, or they do not agree.
    """
    path = folder / MANIFEST
    manifest = _object(read_json(path, "manifest"), path)
    check_format(path, manifest.get("format"))
    for key, kind in (("method", str), ("base", dict), ("tensors", dict)):
        if not isinstance(manifest.get(key), kind):
            raise DeltaError(f"{path}: {key}: missing or of the wrong kind; the file is damaged")
    if not isinstance(manifest.get("files", {}), dict):
        raise DeltaError(f"{path}: files: not a JSON object; the file is damaged")
    if manifest.get("coding") not in (None, *_CODINGS):
        raise DeltaError(
            f"{path}: coding {manifest['coding']!r} is not known to esft {esft.__version__}; "
            f"install a newer esft: pip install --upgrade esft"
        )
    base = read_base(folder / BASE)
    if manifest["base"].get("fingerprint") != fingerprint_digest(base):
        raise DeltaError(
            f"{folder / BASE}: damaged: its sha256 is not base.fingerprint in {MANIFEST}"
        )
    for name, tensor in manifest["tensors"].items():
        _check_tensor(path, name, tensor, base)
        for key, coding in (("coded", CODING), ("factors", LOW_RANK)):
            if (key in tensor) != (manifest.get("coding") == coding):
                raise DeltaError(f"{path}: tensor {name}: {key} and coding do not agree; damaged")
    if manifest.get("coding") == LOW_RANK:
        _check_low_rank(path, manifest.get("low_rank"))
    return manifest, base


def check_format(path: Path, found: Any) -> None:
    """Refuse a format that this version does not read.

    Raises:
        DeltaError: it is newer, or none of ours.
    """
    if found == FORMAT:
        return
    number = re.fullmatch(r"esft-delta/([0-9]{1,9})", found) if isinstance(found, str) else None
    if number and int(number[1]) > VERSION:
        raise DeltaError(
            f"{path}: the delta's format is {found}, and esft {esft.__version__} reads formats up "
            f"to {FORMAT}; install a newer esft: pip install --upgrade esft"
        )
    raise DeltaError(f'{path}: format: expected "{FORMAT}", found {found!r}')


def read_base(path: Path) -> Fingerprint:
    """Read and check `esft_base.json`, or the `base.json` of version 1.

    Raises:
        DeltaError: it is missing or damaged.
    """
    base = _object(_object(read_json(path, "file of the delta"), path).get("tensors"), path)
    for name, tensor in base.items():
        if not (isinstance(tensor, dict) and _described(tensor)):
            raise DeltaError(f"{path}: tensor {name}: needs dtype, shape and sha256; damaged")
    return base


def check_files(folder: Path, files: Mapping[str, Any], manifest: str = MANIFEST) -> None:
    """Check files of the folder against sizes and hashes.

    Args:
        folder: the delta's folder.
        files: name -> `{"bytes", "sha256"}`.
        manifest: the file that lists them.

    Raises:
        DeltaError: a file is missing or damaged, or the list is.
        ModelError: a file is a symbolic link that leads out of the folder.
    """
    for name, expected in files.items():
        if Path(name).name != name:
            raise DeltaError(f"{folder / manifest}: points outside the folder: {name!r}")
        if not isinstance(expected, dict):
            raise DeltaError(f"{folder / manifest}: files.{name}: not a JSON object")
        path = folder / name
        try:
            refuse_link_outside(path)
            size, digest = path.stat().st_size, sha256_file(path)
        except FileNotFoundError:
            raise DeltaError(f"{path}: this file of the delta is missing") from None
        except (OSError, ValueError) as error:
            raise DeltaError(f"{path}: cannot read this file of the delta: {error}") from None
        if (size, digest) != (expected.get("bytes"), expected.get("sha256")):
            raise DeltaError(f"{path}: damaged: its sha256 is not the one in {manifest}")


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DeltaError(f"{path}: expected a JSON object; the file is damaged")
    return value


def _check_tensor(path: Path, name: str, tensor: Any, base: Fingerprint) -> None:
    """Check the description of one changed tensor against the base's."""
    where = f"{path}: tensor {name}"
    if not (isinstance(tensor, dict) and _described(tensor)):
        raise DeltaError(f"{where}: needs dtype, shape and sha256; the file is damaged")
    check_fits(where, tensor, base.get(name))
    if tensor.get("base_sha256") != base[name]["sha256"]:
        raise DeltaError(f"{where}: base_sha256 is not that of {BASE}")
    coded = tensor.get("coded", {"bytes": 0, "sha256": ""})
    factors = tensor.get("factors", {"left": "", "right": ""})
    if not isinstance(factors, dict) or factors.keys() != {"left", "right"}:
        raise DeltaError(f"{where}: factors: needs left and right; the file is damaged")
    if not (
        isinstance(coded, dict)
        and _is_size(coded.get("bytes"))
        and isinstance(coded.get("sha256"), str)
    ):
        raise DeltaError(f"{where}: coded: needs bytes and sha256; the file is damaged")


def _check_low_rank(path: Path, low_rank: Any) -> None:
    found = low_rank if isinstance(low_rank, dict) else {}
    rank, alpha = found.get("r", 0), found.get("alpha", math.nan)
    numbers = isinstance(rank, int) and isinstance(alpha, int | float)
    if not (numbers and 0 < rank < 2**31 and abs(alpha) < 2**53):
        raise DeltaError(f"{path}: low_rank: needs r above 0, and alpha; the file is damaged")


def check_fits(where: str, tensor: Mapping[str, Any], base: Mapping[str, Any] | None) -> None:
    """Check dtype, shape and rows of a changed tensor against the base's tensor of its name.

    Args:
        where: file and tensor, for messages.
        tensor: `dtype`, `shape`, and `rows` where it holds some rows of the base's.
        base: the base's tensor, or None if it has none of this name.

    Raises:
        DeltaError: it does not fit.
    """
    if base is None:
        raise DeltaError(f"{where}: is not in the base")
    shape = list(base["shape"])
    rows = tensor.get("rows")
    if rows is not None:
        if (
            not isinstance(rows, list)
            or not shape
            or not all(type(row) is int and 0 <= row < shape[0] for row in rows)
            or len(set(rows)) != len(rows)
        ):
            raise DeltaError(f"{where}: rows out of range, or twice the same: {rows}")
        shape[0] = len(rows)
    if tensor["dtype"] != base["dtype"] or tensor["shape"] != shape:
        raise DeltaError(
            f"{where}: is {tensor['dtype']} {tensor['shape']}, {base['dtype']} {shape} is expected"
        )


def _described(tensor: Mapping[str, Any]) -> bool:
    shape, digest = tensor.get("shape"), tensor.get("sha256")
    return (
        isinstance(tensor.get("dtype"), str)
        and isinstance(shape, list)
        and all(_is_size(size) for size in shape)
        and isinstance(digest, str)
        and _SHA256.fullmatch(digest) is not None
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0

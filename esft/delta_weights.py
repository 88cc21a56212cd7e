"""The weights of a delta as they lie in its files: what is listed, whole, finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any

from esft.dtypes import FLOATS, is_finite, width
from esft.errors import DeltaError
from esft.fingerprint import hash_tensor
from esft.manifest import ADAPTER, ADAPTER_WEIGHTS, MANIFEST, STEM, check_files
from esft.shard_writer import Source
from esft.shards import Entry, open_checkpoint, read_blocks, read_header

_THREADS = 4  # hashing releases the interpreter lock; more only fight over the disk
_LISTED = 5  # names in a message


def source_of(
    name: str, tensor: Mapping[str, Any], blocks: Callable[[], Iterable[bytes]]
) -> Source:
    """Return what writes a tensor that a manifest describes, uncoded."""
    shape = tuple(tensor["shape"])
    return Source(name, tensor["dtype"], shape, math.prod(shape) * width(tensor["dtype"]), blocks)


def listed_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, Entry]:
    """Return where the tensors that the manifest lists lie: these, all of them and no others."""
    files = manifest.get("files", {})
    if ADAPTER in files:
        # Without its safetensors file PEFT would look for an adapter in a pickle.
        if ADAPTER_WEIGHTS not in files:
            raise DeltaError(f"{folder / MANIFEST}: {ADAPTER_WEIGHTS} is not listed under files")
        check_files(folder, files)
        return {}
    entries = open_checkpoint(folder, STEM, links=False).entries
    tensors = manifest["tensors"]
    for names, where in (
        (tensors.keys() - entries.keys(), "in the manifest but not in the weights"),
        (entries.keys() - tensors.keys(), "in the weights but not in the manifest"),
    ):
        if names:
            raise DeltaError(f"{folder}: {some_names(names)}: {where}; the delta is damaged")
    for name, entry in entries.items():
        tensor = tensors[name]
        coded = tensor.get("coded")
        dtype, shape = ("U8", [coded["bytes"]]) if coded else (tensor["dtype"], tensor["shape"])
        if (entry.dtype, list(entry.shape)) != (dtype, shape):
            raise DeltaError(
                f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"{dtype} {shape} is expected"
            )
    return entries


def check_values(manifest: dict[str, Any], entries: Mapping[str, Entry]) -> None:
    """Compare every tensor with its sha256 and look for NaN.

    A tensor whose sha256 the manifest lacks (version 1 had none) gets it.

    Raises:
        DeltaError: a tensor is damaged, not finite, or does not hold floating-point numbers.
    """
    coded = manifest.get("coding") is not None
    hash_one = hash_tensor if coded else hash_finite
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_named, repeat(hash_one), entries.items()))
    for (name, entry), digest in zip(entries.items(), hashes, strict=True):
        tensor = manifest["tensors"][name]
        if (tensor["coded"] if coded else tensor).setdefault("sha256", digest) != digest:
            raise DeltaError(
                f"{entry.file}: tensor {name}: damaged: its sha256 is not the one in {MANIFEST}"
            )


def check_adapter(folder: Path) -> None:
    """Look for NaN in an adapter whose files have been checked against their hashes.

    Raises:
        DeltaError: a tensor is not finite, or does not hold floating-point numbers.
    """
    for item in read_header(folder / ADAPTER_WEIGHTS).items():
        _named(hash_finite, item)


def _named(hash_one: Callable[[Entry], str], item: tuple[str, Entry]) -> str:
    name, entry = item
    try:
        return hash_one(entry)
    except ValueError as error:
        raise DeltaError(f"{entry.file}: tensor {name} {error}") from None


def hash_finite(entry: Entry) -> str:
    """Return a tensor's hex sha256.

    Raises:
        ValueError: it is not finite, or does not hold floating-point numbers; the message goes on
            where the tensor's name ends.
    """
    if entry.dtype not in FLOATS:
        raise ValueError(f"is {entry.dtype}; a delta holds floating-point numbers")
    digest, finite = sha256(), True
    for block in read_blocks(entry):
        digest.update(block)
        finite = finite and is_finite(block, entry.dtype)
    if not finite:
        raise ValueError("has NaN or infinite values")
    return digest.hexdigest()


def some_names(names: Collection[str]) -> str:
    """Return the first few of some tensors' names, for a message."""
    shown = sorted(names)[:_LISTED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ("tensor " if len(names) == 1 else "tensors ") + ", ".join(shown) + more

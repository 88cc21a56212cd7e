"""A delta of the coding `low-rank/1`: factors on disk in place of the values that they lead to.

`esft_delta.safetensors` holds `NAME.left` and `NAME.right` for each changed tensor NAME. Its new
value is the base's plus `low_rank.alpha / low_rank.r * left @ right`, see `esft.low_rank_sum`; the
manifest lists that value's sha256, so that whoever computes it knows that it is the trained one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.delta_weights import hash_finite, some_names, source_of
from esft.errors import DeltaError
from esft.fingerprint import Fingerprint
from esft.manifest import LOW_RANK, MANIFEST, STEM, write_manifest
from esft.shard_writer import Source, write_shards
from esft.shards import Entry, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from esft.changes import Changed

SIDES = ("left", "right")


@dataclass(frozen=True)
class Factors:
    """The factors of one tensor of a checkpoint.

    Attributes:
        name: the tensor's.
        left: `[p, r]`; `[n, p, r]` where the tensor on disk holds all experts.
        right: `[r, q]`; `[n, r, q]` likewise.
    """

    name: str
    left: Tensor
    right: Tensor


def write_low_rank_delta(
    folder: Path,
    base: Fingerprint,
    changes: Iterable[Changed],
    factors: Sequence[Factors],
    about: Mapping[str, Any],
    *,
    r: int,
    alpha: float,
) -> None:
    """Write factors, and what they come to, into an existing empty folder.

    Args:
        folder: where to.
        base: fingerprint of the checkpoint that training started from.
        changes: the tensors that have factors, with their new values.
        factors: of each of these tensors.
        about: what the manifest says of the run, see `esft.manifest.write_manifest`.
        r: the rank.
        alpha: the product is multiplied by alpha / r.

    Raises:
        DeltaError: a new value does not fit the base, or is not finite.
        OutputError: the disk is full or read-only.
    """
    from hashlib import sha256

    from esft.changes import in_base_dtype
    from esft.tensors import tensor_blocks

    by_name = {one.name: one for one in factors}
    tensors: dict[str, dict[str, Any]] = {}
    sources = []
    for change in changes:
        if change.name not in by_name:
            continue
        value = in_base_dtype(change, base)
        digest = sha256()
        for block in tensor_blocks(value):
            digest.update(block)
        stored = base[change.name]
        tensor: dict[str, Any] = {"dtype": stored["dtype"], "shape": list(value.shape)}
        if change.rows is not None:
            tensor["rows"] = list(change.rows)
        tensors[change.name] = tensor | {
            "base_sha256": stored["sha256"],
            "sha256": digest.hexdigest(),
        }
        sources += _sources(by_name[change.name])
    written = write_shards(folder, STEM, sources)
    for name, tensor in tensors.items():
        tensor["factors"] = {side: written[f"{name}.{side}"].sha256 for side in SIDES}
    write_manifest(folder, base, about, tensors, LOW_RANK, low_rank={"r": r, "alpha": alpha})


def factor_entries(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """Return where a delta's factors lie: name of the factor -> place, all of them checked.

    Raises:
        DeltaError: a factor is missing or unknown, damaged, not finite, or of a shape that does
            not lead to its tensor's.
    """
    entries = open_checkpoint(folder, STEM, links=False).entries
    wanted = {f"{name}.{side}" for name in manifest["tensors"] for side in SIDES}
    for names, where in (
        (wanted - entries.keys(), "in the manifest but not in the weights"),
        (entries.keys() - wanted, "in the weights but not in the manifest"),
    ):
        if names:
            raise DeltaError(f"{folder}: {some_names(names)}: {where}; the delta is damaged")
    for name, tensor in manifest["tensors"].items():
        left, right = (entries[f"{name}.{side}"] for side in SIDES)
        made = (*left.shape[:-1], right.shape[-1]) if left.shape and right.shape else ()
        fits = left.shape[:-2] == right.shape[:-2] and left.shape[-1:] == right.shape[-2:-1]
        if not fits or math.prod(made) != math.prod(tensor["shape"]) or len(made) < 2:
            raise DeltaError(
                f"{left.file}: the factors of tensor {name} are {list(left.shape)} and "
                f"{list(right.shape)}, which does not make {tensor['shape']}"
            )
        for side, entry in zip(SIDES, (left, right), strict=True):
            try:
                digest = hash_finite(entry)
            except ValueError as error:
                raise DeltaError(f"{entry.file}: tensor {name}.{side} {error}") from None
            if digest != tensor["factors"][side]:
                raise DeltaError(
                    f"{entry.file}: tensor {name}.{side}: damaged: its sha256 is not the one in "
                    f"{MANIFEST}"
                )
    return entries


def low_rank_blocks(
    name: str,
    manifest: Mapping[str, Any],
    factors: Mapping[str, Entry],
    base: Entry,
    rows: Sequence[int] | None,
) -> Iterator[bytes]:
    """Yield a tensor's new value, in pieces.

    Args:
        name: the tensor's.
        manifest: of the delta.
        factors: from `factor_entries`.
        base: the tensor in the base.
        rows: which rows of it change, or None for all.
    """
    from esft.low_rank_sum import summed
    from esft.tensors import read_tensor, tensor_blocks

    left, right = (read_tensor(factors[f"{name}.{side}"]) for side in SIDES)
    scale = manifest["low_rank"]["alpha"] / manifest["low_rank"]["r"]
    yield from tensor_blocks(summed(read_tensor(base, rows), left, right, scale))


def _sources(factors: Factors) -> list[Source]:
    from esft.tensors import TORCH, tensor_blocks

    names = {dtype: name for name, dtype in TORCH.items()}
    found = []
    for side in SIDES:
        value: Tensor = getattr(factors, side)
        described = {"dtype": names[value.dtype], "shape": list(value.shape)}
        blocks = partial(tensor_blocks, value)
        found.append(source_of(f"{factors.name}.{side}", described, blocks))
    return found

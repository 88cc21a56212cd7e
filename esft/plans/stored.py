"""What a checkpoint's files say of themselves: bytes and dtypes, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esft.errors import ModelError
from esft.loading import load_config
from esft.plans.hub_headers import NoHeadersError, hub_tensors
from esft.shards import INDEX, SINGLE, open_checkpoint, shard_files

# safetensors' names. Others are formats of quantised weights.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A checkpoint's weights on disk.

    Attributes:
        bytes: of all tensors.
        tensors: how many there are.
        dtypes: bytes by safetensors' name of the dtype.
        measured: whether headers were read; else this follows from the configuration.
        dtype: what most of the weights are in.
        why: why no headers were read, where none were.
    """

    bytes: int
    tensors: int
    dtypes: dict[str, int]
    measured: bool
    dtype: torch.dtype
    why: str | None = None

    @property
    def words(self) -> str:
        """How many bytes are of which dtype."""
        return ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in self.dtypes.items())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


def read_stored(folder: Path, parameters: int, hub_id: str | None = None) -> Stored:
    """Read the headers of a checkpoint, or say what its configuration implies where none are.

    Args:
        folder: with a `config.json`, with or without weights.
        parameters: of the model, tied ones once.
        hub_id: where the folder is a snapshot of a repository, its name on the hub: headers that
            are not here are read from there, a few kB of each file.

    Raises:
        ModelError: a weights file is missing or its header is damaged.
    """
    if any((folder / name).is_file() for name in (SINGLE, INDEX)) and (
        hub_id is None or all(file.is_file() for file in shard_files(folder))
    ):
        entries = open_checkpoint(folder).entries.values()
        return _sum(folder, [(entry.dtype, entry.end - entry.start) for entry in entries])
    pickled = next((p for kind in ("*.bin", "*.pt") for p in folder.glob(kind)), None)
    if pickled is not None:
        raise ModelError(f"{pickled}: pickled weights are refused; convert to safetensors")
    why = "no weights here"
    if hub_id is not None:
        try:
            return _sum(folder, hub_tensors(hub_id, folder))
        except NoHeadersError as absent:
            why = str(absent)
    dtype = _named_dtype(folder) or torch.float32
    size = parameters * dtype.itemsize
    return Stored(size, 0, {_name(dtype): size}, measured=False, dtype=dtype, why=why)


def _sum(folder: Path, tensors: Iterable[tuple[str, int]]) -> Stored:
    """Sum up what headers say: the dtype and the bytes of each tensor."""
    dtypes: dict[str, int] = {}
    count = 0
    for name, size in tensors:
        dtypes[name] = dtypes.get(name, 0) + size
        count += 1
    floats = {_FLOATS[name]: size for name, size in dtypes.items() if name in _FLOATS}
    most = max(floats, key=lambda dtype: floats[dtype]) if floats else torch.float32
    dtype = _named_dtype(folder) or most
    return Stored(sum(dtypes.values()), count, dtypes, measured=True, dtype=dtype)


def _named_dtype(folder: Path) -> torch.dtype | None:
    config = load_config(folder)
    for place in (config, config.get_text_config()):
        if isinstance(found := getattr(place, "dtype", None), torch.dtype):
            return found
    return None


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in _FLOATS.items() if known == dtype), str(dtype))

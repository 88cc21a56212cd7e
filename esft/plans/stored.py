"""What a checkpoint's files say of themselves: bytes and dtypes, from their headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esft.errors import ModelError
from esft.loading import load_config
from esft.shards import INDEX, SINGLE, Entry, open_checkpoint

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
    """

    bytes: int
    tensors: int
    dtypes: dict[str, int]
    measured: bool
    dtype: torch.dtype

    @property
    def words(self) -> str:
        """How many bytes are of which dtype."""
        return ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in self.dtypes.items())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


def read_stored(folder: Path, parameters: int) -> Stored:
    """Read the headers of a checkpoint, or say what its configuration implies where none are.

    Args:
        folder: with a `config.json`, with or without weights.
        parameters: of the model, tied ones once.

    Raises:
        ModelError: a weights file is missing or its header is damaged.
    """
    named = _named_dtype(folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        pickled = next((p for kind in ("*.bin", "*.pt") for p in folder.glob(kind)), None)
        if pickled is not None:
            raise ModelError(f"{pickled}: pickled weights are refused; convert to safetensors")
        dtype = named or torch.float32
        size = parameters * dtype.itemsize
        return Stored(size, 0, {_name(dtype): size}, measured=False, dtype=dtype)
    entries = open_checkpoint(folder).entries
    dtypes: dict[str, int] = {}
    for entry in entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + _size(entry)
    floats = {_FLOATS[name]: size for name, size in dtypes.items() if name in _FLOATS}
    most = max(floats, key=lambda dtype: floats[dtype]) if floats else torch.float32
    return Stored(sum(dtypes.values()), len(entries), dtypes, measured=True, dtype=named or most)


def _named_dtype(folder: Path) -> torch.dtype | None:
    config = load_config(folder)
    for place in (config, config.get_text_config()):
        if isinstance(found := getattr(place, "dtype", None), torch.dtype):
            return found
    return None


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in _FLOATS.items() if known == dtype), str(dtype))


def _size(entry: Entry) -> int:
    return entry.end - entry.start

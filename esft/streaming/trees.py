"""What a layer returns, as JSON beside a file of its tensors' bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esft.streaming.state_file import StateFile, map_storage


class UnsavableError(Exception):
    """A layer returned something that is not made of tensors, tuples, lists, dicts and numbers."""


def write_tree(value: Any, file: StateFile, written: dict[int, int]) -> Any:
    """Write the tensors of a tree into a file and return what `read_tree` needs to know.

    Args:
        value: tensors in tuples, lists and dicts, with None, numbers and texts.
        file: takes the tensors' storages.
        written: those in the file already: address -> place; new ones are added.

    Raises:
        UnsavableError: there is something else in the tree.
        OutputError: the file cannot be written.
    """
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in written:
            written[storage.data_ptr()] = file.append(storage)
        return {
            "tensor": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "offset": value.storage_offset(),
            "place": written[storage.data_ptr()],
            "bytes": storage.nbytes(),
        }
    # Not of a class of its own: what that class does cannot be written down.
    if type(value) is tuple:
        return {"tuple": [write_tree(item, file, written) for item in value]}
    if type(value) is list:
        return {"list": [write_tree(item, file, written) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: write_tree(item, file, written) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UnsavableError(type(value).__name__)


def read_tree(tree: Any, file: int, device: torch.device) -> Any:
    """Return what `write_tree` wrote; its tensors lie in the file until something changes them.

    Args:
        tree: what `write_tree` returned.
        file: descriptor of the open file.
        device: that the tensors go to.
    """
    ((kind, value),) = ((key, tree[key]) for key in tree if key in _KINDS)
    if kind == "tensor":
        if tree["bytes"]:
            storage = map_storage(file, tree["place"], tree["bytes"])
        else:
            storage = torch.UntypedStorage(0)
        empty = torch.empty(0, dtype=getattr(torch, value))
        return empty.set_(storage, tree["offset"], tree["shape"], tree["stride"]).to(device)
    if kind == "tuple":
        return tuple(read_tree(item, file, device) for item in value)
    if kind == "list":
        return [read_tree(item, file, device) for item in value]
    if kind == "dict":
        return {key: read_tree(item, file, device) for key, item in value.items()}
    return value


_KINDS = ("tensor", "tuple", "list", "dict", "value")

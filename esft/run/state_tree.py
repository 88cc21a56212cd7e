"""Nested Python values <-> JSON and named tensors, exactly: what a training state is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esft.errors import EsftError

_TENSOR, _ARRAY, _TUPLE, _ITEMS = "$tensor", "$array", "$tuple", "$items"


def pack(value: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Take a value apart: `(json, tensors)`, which `unpack` puts together again.

    Args:
        value: dicts, lists, tuples, tensors, NumPy arrays, numbers (infinite ones too), text,
            booleans and None, nested.
        name: of the value; tensors are named by their place in it, `optimizer/state/0/exp_avg`.

    Returns:
        The value with references in place of tensors, ready for `json.dumps` (a tuple or a dict
        whose keys are no text is marked as such), and the tensors by name, on the CPU.

    Raises:
        EsftError: it holds something else; names the place.
    """
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def take(item: Any, place: str) -> Any:
        if isinstance(item, np.ndarray):
            tensors[place] = torch.from_numpy(item.copy())
            return {_ARRAY: place}
        if isinstance(item, Tensor):
            own = item.detach().cpu().contiguous()
            # bitsandbytes has one table of values for all states; a file has each tensor by itself.
            if own.untyped_storage().data_ptr() in memory:
                own = own.clone()
            memory.add(own.untyped_storage().data_ptr())
            tensors[place] = own
            return {_TENSOR: place}
        if isinstance(item, Mapping):
            inside = [(key, take(part, f"{place}/{key}")) for key, part in item.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return dict(inside)
            return {_ITEMS: [[key, part] for key, part in inside]}
        if isinstance(item, list | tuple):
            parts = [take(part, f"{place}/{number}") for number, part in enumerate(item)]
            return parts if isinstance(item, list) else {_TUPLE: parts}
        if isinstance(item, np.integer | np.floating | np.bool_):
            return item.item()
        if item is None or isinstance(item, bool | int | float | str):
            return item
        raise EsftError(f"{place}: a checkpoint cannot hold a {type(item).__name__}")

    return take(value, name), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` took apart; the tensors are those given, not copies."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    if _TENSOR in packed:
        return tensors[packed[_TENSOR]]
    if _ARRAY in packed:
        return tensors[packed[_ARRAY]].numpy()
    if _TUPLE in packed:
        return tuple(unpack(part, tensors) for part in packed[_TUPLE])
    if _ITEMS in packed:
        return {key: unpack(part, tensors) for key, part in packed[_ITEMS]}
    return {key: unpack(part, tensors) for key, part in packed.items()}


def digest(tensor: Tensor) -> str:
    """Return the hex sha256 of a tensor's dtype, shape and bytes, wherever it lies."""
    start = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(start)
    found.update(content.data)
    return found.hexdigest()

"""What `moe_mlp` accepts: shapes, dtypes and devices, told by the argument's name."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import ExpertBank, Projection
from esft_kernels.quantised.storage import Quantised

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FLOAT = "bfloat16, float16, float32 or float64"


def check(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> None:
    """Refuse what no path computes. Reads no value on a GPU, so that it is not waited for.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    slot, projections = bank.slot, (("bank.up", bank.up), ("bank.down", bank.down))
    whole = slot.dim() == 1 and slot.dtype == torch.int64
    _expect(whole and slot.shape[0] > 0, "bank.slot", "[E] int64, with E above 0", slot)
    for name, projection in projections:
        for key, tensor in _tensors(projection).items():
            dims, letters = (2, "[.., out]") if "bias" in key else (3, "[.., out, in]")
            _expect(tensor.dim() == dims, f"{name}.{key}", letters, tensor)
    hidden = bank.up.in_features
    _expect(x.dim() == 2 and x.shape[1] == hidden, "x", f"[T, {hidden}]", x)
    _expect(x.dtype in _FLOATS, "x", _FLOAT, x)
    tokens = x.shape[0]
    _expect(
        topk_index.dim() == 2 and topk_index.shape[0] == tokens and topk_index.shape[1] > 0,
        "topk_index",
        f"[{tokens}, K], a row of expert ids for each row of x",
        topk_index,
    )
    integer = topk_index.dtype in (torch.int64, torch.int32)
    _expect(integer, "topk_index", "int64 or int32", topk_index)
    same = topk_weight.shape == topk_index.shape
    _expect(same, "topk_weight", f"{list(topk_index.shape)}, as topk_index", topk_weight)
    _expect(topk_weight.dtype in _FLOATS, "topk_weight", _FLOAT, topk_weight)
    for name, projection in projections:
        _check_projection(name, projection, bank)
    down = bank.down
    _expect(
        down.out_features == hidden, "bank.down.frozen", f"an output of width {hidden}", down.frozen
    )
    if isinstance(bank.activation, SwiGLU):
        _expect(
            bank.up.out_features == 2 * down.in_features,
            "bank.up.frozen",
            f"an output of width {2 * down.in_features}, twice bank.down's input",
            bank.up.frozen,
        )
    everything: dict[str, Tensor | Quantised] = {
        "topk_index": topk_index,
        "topk_weight": topk_weight,
        "bank.slot": slot,
    }
    for name, projection in projections:
        everything |= {f"{name}.{key}": value for key, value in _tensors(projection).items()}
    for name, tensor in everything.items():
        _expect(tensor.device == x.device, name, f"device {x.device}, as x", tensor)
    if slot.device.type == "cpu" and (slot.min() < 0 or slot.max() >= bank.num_slots):
        raise ValueError(
            f"bank.slot: expected slots 0 to {bank.num_slots - 1}, got {slot.tolist()}"
        )


def check_ids(topk_index: Tensor, num_experts: int) -> None:
    """Refuse expert ids that name no expert. Waits for a GPU.

    Raises:
        ValueError: an id is below -1 or above E.
    """
    if topk_index.numel() and (topk_index.min() < -1 or topk_index.max() > num_experts):
        raise bad_ids(topk_index, num_experts)


def check_inner(a: Tensor, z: Tensor, bank: ExpertBank) -> Tensor:
    """Refuse an activation whose result does not fit the down projection.

    Args:
        a: what the activation returned.
        z: what it was given.
        bank: whose activation it is.

    Returns:
        a.

    Raises:
        ValueError: a's width is not bank.down's input, or its dtype is not z's.
    """
    expected = [z.shape[0], bank.down.in_features]
    fits = list(a.shape) == expected and a.dtype == z.dtype
    _expect(fits, "bank.activation", f"a result of shape {expected} in {z.dtype}", a)
    return a


def bad_ids(topk_index: Tensor, num_experts: int) -> ValueError:
    """Say where the first expert id is that names no expert."""
    token, k = ((topk_index < -1) | (topk_index > num_experts)).nonzero()[0].tolist()
    return ValueError(
        f"topk_index: expected expert ids 0 to {num_experts - 1} (or -1 or {num_experts} for an "
        f"expert held elsewhere), got {int(topk_index[token, k])} at [{token}, {k}]"
    )


def _check_projection(name: str, projection: Projection, bank: ExpertBank) -> None:
    n, rest = bank.num_selected, bank.up.frozen.shape[0]
    shape = (projection.in_features, projection.out_features)
    shape = shape if projection.transposed else shape[::-1]
    out = projection.out_features
    expected = {
        "trainable": [n, *shape],
        "frozen": [rest, *shape],
        "trainable_bias": [n, out],
        "frozen_bias": [rest, out],
    }
    tensors = _tensors(projection)
    for key, tensor in tensors.items():
        label = f"{name}.{key}"
        _expect(list(tensor.shape) == expected[key], label, f"{expected[key]}", tensor)
        _expect(tensor.dtype in _FLOATS, label, _FLOAT, tensor)
    _expect(
        projection.frozen.dtype == bank.dtype,
        f"{name}.frozen",
        f"{bank.dtype}, as bank.up.frozen",
        projection.frozen,
    )
    if ("trainable_bias" in tensors) != ("frozen_bias" in tensors):
        raise ValueError(f"{name}: expected a bias in both banks or in neither")


def _tensors(projection: Projection) -> dict[str, Tensor | Quantised]:
    names = ("trainable", "frozen", "trainable_bias", "frozen_bias")
    found = {name: getattr(projection, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _expect(holds: bool, name: str, expected: str, got: Tensor | Quantised) -> None:
    if not holds:
        raise ValueError(
            f"{name}: expected {expected}; got shape {list(got.shape)}, {got.dtype}, {got.device}"
        )

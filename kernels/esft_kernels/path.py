"""Which of the three paths computes a layer: `naive`, `grouped` (PyTorch) or `triton`."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from esft_kernels.bank import ExpertBank
from esft_kernels.quantised.storage import Quantised

PATHS = ("naive", "grouped", "triton")
VARIABLE = "ESFT_KERNELS"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Offsets within a tile, and within one expert's matrix, are 32-bit in the kernels.
_LARGEST = 2**31


def choose(x: Tensor, bank: ExpertBank) -> str:
    """Return the path for this input: what `ESFT_KERNELS` says, else by device.

    A GPU that the Triton kernels do not serve gets the PyTorch path and a warning, once, that says
    why.

    Raises:
        ValueError: `ESFT_KERNELS` names no path, or `triton` where it cannot run.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked:
        if asked not in PATHS:
            raise ValueError(f"{VARIABLE}={asked}: expected one of {', '.join(PATHS)}")
        reason = obstacle(x, bank) if asked == "triton" else None
        if reason:
            raise ValueError(f"{VARIABLE}=triton: {reason}")
        return asked
    if x.device.type != "cuda":
        return "grouped"
    reason = obstacle(x, bank)
    if reason is None:
        return "triton"
    _warn(reason)
    return "grouped"


def obstacle(x: Tensor, bank: ExpertBank) -> str | None:
    """Say why the Triton kernels cannot compute this input, or return None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"x is on {x.device}; on a CPU the kernels need TRITON_INTERPRET=1"
    if x.device.type == "cuda":
        if torch.version.hip:
            return "AMD GPUs are untested"
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not among {', '.join(str(dtype) for dtype in _DTYPES)}"
    for name, projection in (("bank.up", bank.up), ("bank.down", bank.down)):
        trainable, frozen = projection.trainable, projection.frozen
        if isinstance(frozen, Quantised):
            # What is multiplied by is dequantised into a buffer without gaps.
            frozen = torch.empty(frozen.shape, dtype=frozen.dtype, device="meta")
        if not _same_layout(trainable, frozen):
            return f"the two banks of {name} differ in memory layout"
        if frozen.stride(0) >= _LARGEST or trainable.stride(0) >= _LARGEST:
            return f"an expert of {name} has 2^31 elements or more"
    return None


def _same_layout(trainable: Tensor, frozen: Tensor) -> bool:
    if trainable.shape[0] == 0 or frozen.shape[0] == 0:
        return True
    if trainable.dtype != frozen.dtype:
        # What is multiplied by is a cast of it, and a cast closes gaps.
        trainable = torch.empty_like(trainable, dtype=frozen.dtype, device="meta")
    return trainable.stride()[1:] == frozen.stride()[1:]


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"esft runs its experts through PyTorch's grouped_mm, not through its Triton kernels: "
        f"{reason}",
        stacklevel=4,
    )

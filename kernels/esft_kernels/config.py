"""Tile sizes of the Triton kernels: a checked-in table, so that nothing is tuned while training.

`configs/<architecture>.json` has an entry for each shape that was looked at; a layer gets the
nearest. `kernels/bench/tune.py` writes the table.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

KERNELS = ("up_swiglu_fwd", "grouped_gemm", "gather_sum", "down_dact_bwd", "wgrad_selected")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90")


@dataclass(frozen=True)
class Config:
    """Tile sizes of one layer.

    Attributes:
        block_m: rows of a tile, the same for all kernels that share a tile list.
        kernels: name of a kernel -> its constants, `num_warps` and `num_stages`.
    """

    block_m: int
    kernels: Mapping[str, Mapping[str, int]]


# Triton's interpreter takes time by the program, not by the element.
_INTERPRETER = Config(
    block_m=16,
    kernels={
        "up_swiglu_fwd": {"BN": 32, "BK": 32},
        "grouped_gemm": {"BN": 32, "BK": 32},
        "gather_sum": {"BT": 16, "BH": 32},
        "down_dact_bwd": {"BN": 32, "BK": 32, "SPLIT": 2},
        "wgrad_selected": {"BP": 32, "BQ": 32, "BR": 16},
    },
)


def layer_config(
    device: torch.device, dtype: torch.dtype, hidden: int, inner: int, rows_per_expert: float
) -> Config:
    """Return the tile sizes for a layer on this device.

    Args:
        device: a CUDA device; a CPU means Triton's interpreter.
        dtype: of the computation.
        hidden: H.
        inner: I.
        rows_per_expert: N / E.
    """
    if device.type == "cpu":
        return _INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    # Powers of two: otherwise each batch would look anew.
    bucket = 2 ** round(math.log2(max(rows_per_expert, 1)))
    return nearest(architecture(capability), dtype.itemsize, hidden, inner, bucket)


def architecture(capability: tuple[int, int]) -> str:
    """Return the table's architecture for a compute capability, by its shared memory.

    A block may use 163 KB on 8.0, 227 KB on 9.0 and 10.0, and 99 KB on the others.
    """
    if capability == (8, 0):
        return "sm_80"
    return "sm_90" if capability[0] in (9, 10) else "sm_86"


@functools.cache
def nearest(arch: str, itemsize: int, hidden: int, inner: int, rows: int) -> Config:
    """Return the entry whose H, I and rows per expert are nearest, by their ratios.

    Args:
        arch: one of `ARCHITECTURES`.
        itemsize: bytes of an element of the computation.
        hidden: H.
        inner: I.
        rows: rows per expert.
    """

    def distance(entry: dict[str, Any]) -> float:
        wanted = {"H": hidden, "I": inner, "rows": rows}
        return sum(abs(math.log2(entry[key] / value)) for key, value in wanted.items())

    entries = [entry for entry in table(arch) if entry["itemsize"] == itemsize]
    best = min(entries, key=distance)
    return Config(best["block_m"], {name: best[name] for name in KERNELS})


@functools.cache
def table(arch: str) -> list[dict[str, Any]]:
    """Return an architecture's entries, as `configs/<arch>.json` has them."""
    path = resources.files("esft_kernels") / "configs" / f"{arch}.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return entries

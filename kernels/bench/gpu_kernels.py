"""Each kernel of a layer as a call of its own, on the tensors that it gets in the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from esft_kernels import ExpertBank
from esft_kernels.config import Config, layer_config
from esft_kernels.down_dact_bwd.triton import down_dact_bwd
from esft_kernels.gather_sum.triton import gather_sum
from esft_kernels.grouped_gemm.triton import grouped_gemm
from esft_kernels.route.triton import route
from esft_kernels.up_swiglu_fwd.triton import up_swiglu_fwd
from esft_kernels.wgrad_selected.triton import wgrad_selected
from gpu_setting import Inputs
from torch import Tensor

Run = Callable[[int], Tensor]
"""Launches a kernel for the batch of this number and returns one of its results."""


def table_tiles(batch: Inputs, bank: ExpertBank) -> Config:
    """Return the tile sizes that a layer takes from the table."""
    rows_per_expert = batch.index.numel() / bank.num_experts
    sizes = (bank.up.in_features, bank.down.in_features, rows_per_expert)
    return layer_config(batch.x.device, bank.dtype, *sizes)


def kernel_runs(batches: list[Inputs], bank: ExpertBank, tiles: Config) -> dict[str, Run]:
    """Return a function for each kernel, by its name in `floor.KERNELS`.

    What lies between kernels is of the first batch: it is larger than a cache.

    Args:
        batches: inputs that take turns.
        bank: of a plain SwiGLU.
        tiles: tile sizes.
    """
    size, n, swiglu = tiles.kernels, bank.num_selected, bank.activation
    x, gates = [b.x.detach() for b in batches], [b.gates.detach() for b in batches]
    d_out = [b.d_out for b in batches]
    rows = [route(b.index, bank.slot, tiles.block_m) for b in batches]
    ups, downs = bank.up.matrices(), bank.down.matrices()
    backs = ups.transpose()

    def up(i: int) -> tuple[Tensor, Tensor]:
        return up_swiglu_fwd(x[i], ups, rows[i], swiglu, size["up_swiglu_fwd"])

    z, a = up(0)

    def down(_: int) -> Tensor:
        return grouped_gemm(a, downs, rows[0], gather=False, config=size["grouped_gemm"])

    y = down(0)

    def back(i: int) -> tuple[Tensor, Tensor, Tensor]:
        return down_dact_bwd(d_out[i], downs, z, gates[i], rows[0], swiglu, size["down_dact_bwd"])

    dz, gated, _ = back(0)

    def outer(p: Tensor, q: Tensor, gather_p: bool) -> Tensor:
        return wgrad_selected(
            p,
            q,
            rows[0],
            n,
            gather_p=gather_p,
            gather_q=not gather_p,
            dtype=torch.float32,
            config=size["wgrad_selected"],
        )

    def dx(_: int) -> Tensor:
        return grouped_gemm(dz, backs, rows[0], gather=False, config=size["grouped_gemm"])

    d_rows = dx(0)
    return {
        "route": lambda i: route(batches[i].index, bank.slot, tiles.block_m).place,
        "up_swiglu_fwd": lambda i: up(i)[1],
        "grouped_gemm down": down,
        "gather_sum out": lambda i: gather_sum(y, rows[0], gates[i], config=size["gather_sum"]),
        "down_dact_bwd": lambda i: back(i)[0],
        "wgrad_selected down": lambda i: outer(d_out[i], gated, True),
        "wgrad_selected up": lambda i: outer(dz, x[i], False),
        "grouped_gemm dx": dx,
        "gather_sum dx": lambda _: gather_sum(d_rows, rows[0], config=size["gather_sum"]),
    }

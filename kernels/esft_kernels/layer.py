"""`moe_mlp`: checks its arguments, picks a path and runs it."""

from __future__ import annotations

from torch import Tensor

from esft_kernels import grouped, naive
from esft_kernels.bank import ExpertBank
from esft_kernels.checks import check, check_ids
from esft_kernels.path import choose


def moe_mlp(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> Tensor:
    """Compute `out[t] = sum_k topk_weight[t, k] * expert[topk_index[t, k]](x[t])`.

    The backward gives the gradients of `x` and `topk_weight` through all experts, and weight
    gradients for the trainable bank alone: nothing of the frozen bank's size is ever allocated.
    A quantised frozen bank is dequantised some experts at a time, in the backward anew.
    Two calls with equal input give equal bits. Triton kernels on an NVIDIA GPU, PyTorch elsewhere;
    the environment variable `ESFT_KERNELS` (`naive`, `grouped` or `triton`) overrides the choice.

    Args:
        x: `[T, H]`; cast to the frozen bank's dtype, in which everything is computed. The
            trainable bank is cast to it too.
        topk_index: `[T, K]` int64 or int32 expert ids, 0 to E - 1. The ids -1 and E stand for an
            expert that is held elsewhere (expert parallelism): such a row adds nothing.
        topk_weight: `[T, K]`, the weight of each chosen expert's output; the products are summed
            in the wider dtype of this and x.
        bank: the experts.

    Returns:
        `[T, H]` in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is wrong, or an id names no expert. The
            Triton kernels do not wait for the GPU to learn that: there, tokens with such an id
            come out as NaN.
    """
    check(x, topk_index, topk_weight, bank)
    # The weights decide, as in transformers: casting the frozen bank would copy it at each step.
    rows = x.to(bank.dtype)
    path = choose(rows, bank)
    if path == "triton":
        # Not at the top: Triton exists on Linux only.
        from esft_kernels import tiled

        out = tiled.moe_mlp(rows, topk_index, topk_weight, bank)
    elif path == "grouped":
        out = grouped.moe_mlp(rows, topk_index, topk_weight, bank)
    else:
        check_ids(topk_index, bank.num_experts)
        out = naive.moe_mlp(rows, topk_index, topk_weight, bank)
    return out.to(x.dtype)

"""The oracle: the same function as `moe_mlp`, one expert after the other, in any dtype."""

from __future__ import annotations

from torch import Tensor

from esft_kernels.bank import ExpertBank, Projection
from esft_kernels.checks import check_inner
from esft_kernels.chunks import StoredLinear
from esft_kernels.quantised.storage import Quantised


def moe_mlp(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> Tensor:
    """Compute `out[t] = sum_k topk_weight[t, k] * expert[topk_index[t, k]](x[t])`.

    Readable, slow, differentiable by autograd in every input. Shapes as `esft_kernels.moe_mlp`.
    """
    out = x.new_zeros(x.shape)
    for expert in range(bank.num_experts):
        token, k = (topk_index == expert).nonzero(as_tuple=True)
        z = _linear(x[token], bank.up, int(bank.slot[expert]))
        a = check_inner(bank.activation(z), z, bank)
        y = _linear(a, bank.down, int(bank.slot[expert]))
        out = out.index_add(0, token, (y * topk_weight[token, k, None]).to(out.dtype))
    return out


def _linear(x: Tensor, projection: Projection, slot: int) -> Tensor:
    n = projection.trainable.shape[0]
    trains = slot < n
    place = slot if trains else slot - n
    bias = projection.trainable_bias if trains else projection.frozen_bias
    bank = projection.trainable if trains else projection.frozen
    if isinstance(bank, Quantised):
        y = StoredLinear.apply(x, projection.matrices().frozen, place)
    else:
        weight = bank[place].to(x.dtype)
        y = x @ (weight if projection.transposed else weight.t())
    return y if bias is None else y + bias[place].to(x.dtype)

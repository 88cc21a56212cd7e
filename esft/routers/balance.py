"""Losses that even out what a router sends to its experts, and one that keeps its logits small.

Pure functions of what one layer's router computed for T tokens. All but `router_z` are at their
lowest where every expert gets the same. Letters: T tokens, E experts, K choices a token, C classes
(E, or more where a router may choose none of the experts). An id outside 0 to E - 1 is a choice of
no expert; it still counts among the K T choices. Means are over the tokens that count.

Sums are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(affinity_TE: Tensor, index_TK: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Return the load balance loss of Switch Transformers, for any K: K where all is even.

        L = E * sum_i f_i * P_i
        f_i = 1/T * sum_t [token t chooses expert i]
        P_i = 1/T * sum_t p_i(t)

    arXiv 2101.03961, equations 4 to 6, where K is 1. GShard (arXiv 2006.16668, algorithm 1) has
    the same product for K = 2 but counts the first choice alone; here all K count, as in
    transformers' `load_balancing_loss_func`, and its coefficients (`router_aux_loss_coef`) fit.

    Args:
        affinity_TE: the router's distribution p over the experts, `[T, E]`; f has no gradient.
        index_TK: ids of the experts chosen, `[T, K]`.
        counted_T: true for tokens that count, `[T]`; None counts all.
    """
    E, P_E = affinity_TE.shape[-1], _mean(affinity_TE, counted_T)
    f_E = load(index_TK, E, counted_T).to(P_E.dtype) / _counted(affinity_TE, counted_T)
    return E * (f_E * P_E).sum()


def expert_balance(
    affinity_TE: Tensor, index_TK: Tensor, counted_T: Tensor | None = None
) -> Tensor:
    """Return DeepSeekMoE's expert-level balance loss: 1 where all is even.

        L = sum_i f_i * P_i
        f_i = E / (K T) * sum_t [token t chooses expert i]
        P_i = 1/T * sum_t s_i(t)

    arXiv 2401.06066, equations 12 to 14, over the routed experts; DeepSeek-V2 has the same
    (arXiv 2405.04434). It is `load_balance` divided by K.

    Args:
        affinity_TE: the router's distribution s over the experts, `[T, E]`; f has no gradient.
        index_TK: ids of the experts chosen, `[T, K]`.
        counted_T: true for tokens that count, `[T]`; None counts all.
    """
    return load_balance(affinity_TE, index_TK, counted_T) / index_TK.shape[-1]


def device_balance(
    affinity_TE: Tensor,
    index_TK: Tensor,
    devices: Sequence[Sequence[int]],
    counted_T: Tensor | None = None,
) -> Tensor:
    """Return DeepSeekMoE's device-level balance loss: 1 where all is even.

        L = sum_d f'_d * P'_d
        f'_d = 1/|E_d| * sum_{i in E_d} f_i
        P'_d = sum_{i in E_d} P_i

    with f and P of `expert_balance` (arXiv 2401.06066, equations 15 to 17; arXiv 2405.04434).

    Args:
        affinity_TE: the router's distribution over the experts, `[T, E]`; f has no gradient.
        index_TK: ids of the experts chosen, `[T, K]`.
        devices: of each of D devices the ids of its experts; each expert is on one.
        counted_T: true for tokens that count, `[T]`; None counts all.
    """
    E, K = affinity_TE.shape[-1], index_TK.shape[-1]
    place_E = torch.empty(E, dtype=torch.int64)
    for number, experts in enumerate(devices):
        place_E[list(experts)] = number
    place_E = place_E.to(affinity_TE.device)
    P_E = _mean(affinity_TE, counted_T)
    f_E = load(index_TK, E, counted_T).to(P_E.dtype) * E / (K * _counted(affinity_TE, counted_T))
    zero_D = P_E.new_zeros(len(devices))
    size_D = zero_D.index_add(0, place_E, torch.ones_like(P_E))
    f_D = zero_D.index_add(0, place_E, f_E) / size_D
    return (f_D * zero_D.index_add(0, place_E, P_E)).sum()


def sequence_balance(affinity_TE: Tensor, sequence_T: Tensor, top_k: int) -> Tensor:
    """Return DeepSeek-V3's complementary loss, averaged over sequences: 1 where all is even.

        L = sum_i f_i * P_i                     for each sequence of T tokens
        f_i = E / (K T) * sum_t [s_i(t) is among the K highest of token t]
        P_i = 1/T * sum_t s'_i(t)

    with `s'` the scores divided by their sum (arXiv 2412.19437, equations 17 to 20). The K highest
    are those of the scores alone, as there: neither a bias nor groups, with which the router
    chooses, take part.

    Args:
        affinity_TE: `s'`, `[T, E]`; f has no gradient.
        sequence_T: which sequence a token is of, from 0, `[T]`; -1 for tokens that do not count.
        top_k: K.
    """
    real_T = sequence_T >= 0
    affinity_TE, sequence_T = _wide(affinity_TE[real_T]), sequence_T[real_T]
    # Packed blocks end with padding, so numbers may be missing.
    _, sequence_T, length_S = sequence_T.unique(return_inverse=True, return_counts=True)
    E, S = affinity_TE.shape[-1], len(length_S)
    zero_SE = affinity_TE.new_zeros(S, E)
    chosen_TE = torch.zeros_like(affinity_TE)
    chosen_TE.scatter_(1, affinity_TE.detach().topk(top_k).indices, 1)
    f_SE = zero_SE.index_add(0, sequence_T, chosen_TE) * E / top_k / length_S[:, None]
    P_SE = zero_SE.index_add(0, sequence_T, affinity_TE) / length_S[:, None]
    return (f_SE * P_SE).sum(dim=-1).mean()


def importance(
    weight_TK: Tensor, index_TK: Tensor, num_experts: int, counted_T: Tensor | None = None
) -> Tensor:
    """Return the squared coefficient of variation of the experts' importance: 0 where all is even.

        L = CV(I)^2 = Var(I) / Mean(I)^2
        I_i = sum_t g_i(t)

    arXiv 1701.06538, equations 6 and 7. The variance is the population's, divided by E. A constant
    factor in the gate values changes nothing.

    Args:
        weight_TK: gate values g of the experts chosen, `[T, K]`.
        index_TK: their ids, `[T, K]`.
        num_experts: E.
        counted_T: true for tokens that count, `[T]`; None counts all.
    """
    gate_TK = _wide(weight_TK)
    if counted_T is not None:
        gate_TK = gate_TK * counted_T[:, None]
    sum_E = gate_TK.new_zeros(num_experts + 1)
    sum_E = sum_E.index_add(0, _column(index_TK, num_experts), gate_TK.flatten())[:-1]
    return sum_E.var(correction=0) / sum_E.mean().square()


def router_z(logits_TC: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Return ST-MoE's router z-loss, which keeps logits small: 0 at best.

        L = 1/T * sum_t (log sum_c exp z_c(t))^2

    arXiv 2202.08906, equation 5.

    Args:
        logits_TC: the router's logits z, `[T, C]`.
        counted_T: true for tokens that count, `[T]`; None counts all.
    """
    square_T = _wide(logits_TC).logsumexp(dim=-1).square()
    return _mean(square_T[:, None], counted_T).sum()


def bias_step(load_E: Tensor) -> Tensor:
    """Return which way each expert's bias goes after a step: `sign(mean(n) - n_i)`, `[E]`.

    DeepSeek-V3 adds u times this to the bias with which the router chooses (arXiv 2408.15664,
    algorithm 1; arXiv 2412.19437, section 2.1.2, where u is gamma): an expert with less than the
    mean load becomes likelier to be chosen, one with more less likely.

    Args:
        load_E: how many tokens of the step chose each expert, `[E]`.
    """
    return (load_E.mean() - load_E).sign()


def load(index_TK: Tensor, num_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """Return how often counted tokens chose each expert, `[E]`, float64; it has no gradient."""
    one_TK = torch.ones(index_TK.shape, dtype=torch.float64, device=index_TK.device)
    if counted_T is not None:
        one_TK = one_TK * counted_T[:, None]
    sum_E = one_TK.new_zeros(num_experts + 1)
    return sum_E.index_add(0, _column(index_TK, num_experts), one_TK.flatten())[:-1]


def _column(index_TK: Tensor, E: int) -> Tensor:
    """Return ids flattened, E for choices of no expert."""
    return torch.where((index_TK >= 0) & (index_TK < E), index_TK, E).flatten()


def _counted(x_TX: Tensor, counted_T: Tensor | None) -> Tensor:
    """Return how many tokens count, in the dtype of sums."""
    if counted_T is None:
        return torch.tensor(x_TX.shape[0], dtype=_wide(x_TX).dtype, device=x_TX.device)
    return counted_T.sum(dtype=_wide(x_TX).dtype)


def _mean(x_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    """Return the mean over the tokens that count, `[E]`."""
    x_TE = _wide(x_TE)
    if counted_T is not None:
        x_TE = x_TE * counted_T[:, None]
    return x_TE.sum(dim=0) / _counted(x_TE, counted_T)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""What routers are trained with beside the language model's own loss.

All take the routers' logits and which tokens count: padding never does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from esft.routers import balance


def load_balance_loss(
    logits: Sequence[Tensor], top_k: int, counted_T: Tensor | None = None
) -> Tensor:
    """Return `E * sum_i f_i * P_i`, averaged over layers (arXiv 2101.03961, equations 4 to 6).

    `f_i` is the share of tokens whose top-K holds expert i, `P_i` the mean router probability of
    expert i. K where all experts are used alike, as transformers counts it for top-K routers.

    Args:
        logits: of each layer's router, `[T, E]`.
        top_k: K.
        counted_T: 1 for tokens that count, else 0; None counts all.
    """
    losses = []
    for logits_TE in logits:
        p_TE = logits_TE.softmax(dim=-1, dtype=_wide(logits_TE))
        losses.append(balance.load_balance(p_TE, p_TE.topk(top_k).indices, _flat(counted_T)))
    return torch.stack(losses).mean()


def router_z_loss(logits: Sequence[Tensor], counted_T: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of `logsumexp(logits) ** 2`, averaged over layers.

    Keeps router logits small (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: of each layer's router, `[T, E]`.
        counted_T: 1 for tokens that count, else 0; None counts all.
    """
    return torch.stack([balance.router_z(x_TE, _flat(counted_T)) for x_TE in logits]).mean()


def usage_entropy(logits: Sequence[Tensor], counted_BS: Tensor | None = None) -> Tensor:
    """Return the entropy of a sequence's mean expert distribution, averaged over sequences.

    The distribution is the softmax of the router's logits, averaged over a sequence's tokens and
    over all uses of the (shared) layer: sigma-MoE (arXiv 2310.10837) as MoEUT trains it
    (arXiv 2405.16039, section 2.1). Its negative is the regulariser: in nats, `-log E` at best.

    Args:
        logits: of one router at each of its uses, `[B, S, ..., E]`; other dimensions (heads) are
            averaged over at last.
        counted_BS: 1 for tokens that count, else 0; None counts all. A sequence needs one.
    """
    log_p_BSUE = torch.stack([x.log_softmax(dim=-1, dtype=_wide(x)) for x in logits], dim=2)
    B, S, U = log_p_BSUE.shape[:3]
    if counted_BS is None:
        counted_BS = log_p_BSUE.new_ones(B, S)
    log_weight_BS = counted_BS.to(log_p_BSUE.dtype).log()
    log_weight_BS = log_weight_BS - log_weight_BS.logsumexp(dim=1, keepdim=True)
    shape = (B, S, *[1] * (log_p_BSUE.dim() - 2))
    log_mean = (log_p_BSUE + log_weight_BS.view(shape)).logsumexp(dim=(1, 2))
    log_mean = log_mean - math.log(U)
    return -(log_mean.exp() * log_mean).sum(dim=-1).mean()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flat(counted: Tensor | None) -> Tensor | None:
    return None if counted is None else counted.flatten()

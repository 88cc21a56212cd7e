"""A model's parameters by kind: routed experts, shared experts, routers, attention, norms, ..."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from esft.moe import MoeLayer
from esft.trained_parts import NON_EXPERT_MODULES, parameter_parts

ROUTED, ATTENTION, NORMS, EMBEDDINGS, OTHER = (
    "routed_experts",
    "attention",
    "norms",
    "embeddings",
    "other",
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NORM = re.compile(r"norm", re.IGNORECASE)


def by_kind(model: nn.Module, layers: Sequence[MoeLayer]) -> dict[str, int]:
    """Count a model's parameters by kind, tied ones once; kinds that it lacks are left out.

    `embeddings` are the tokens' and the output layer; `other` is dense MLP layers, state-space
    layers, towers for images and sound.

    Args:
        model: with no selection attached.
        layers: its MoE layers.
    """
    parts = parameter_parts(model, layers)
    owners = dict(model.named_modules())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        kind = _kind(name, owner, parts, any(owner is end for end in ends))
        found[kind] = found.get(kind, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kind(name: str, owner: nn.Module, parts: Mapping[str, str], embeds: bool) -> str:
    part = parts.get(name, ROUTED)
    if part != NON_EXPERT_MODULES:
        return part
    if embeds or isinstance(owner, nn.Embedding):
        return EMBEDDINGS
    # Before attention, which has norms of its own (`self_attn.q_norm`).
    if _NORM.search(type(owner).__name__) or _NORM.search(".".join(name.split(".")[-2:])):
        return NORMS
    return ATTENTION if _ATTENTION.search(name) else OTHER


def largest_layer(model: nn.Module, itemsize: int) -> int:
    """Return the bytes of the largest layer's weights; what is in no layer counts as one."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = "" if place is None else ".".join(parts[: place + 1])
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    return max(sizes.values()) * itemsize

"""What routers compute in a forward pass, with gradients: logits, affinities, choices, weights.

Hooks are there only while a forward pass is watched. They keep references and compute nothing, so
that gradient checkpointing, which runs layers again without them, finds the same tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esft.errors import ModelError, RecipeError
from esft.layouts.layout import is_a
from esft.moe import MoeLayer

# How far a token's share of gates may be off if scores are computed anew: routers may compute in
# bfloat16.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class RouterPass:
    """What one layer's router computed for the T tokens of a batch.

    Attributes:
        layer: whose router.
        logits: `[T, C]`; C is E, or more where the router may choose none of the experts.
        affinity: the distribution over experts that its scores amount to, `[T, E]`, at least
            float32: softmax of the logits, or other scores divided by their sum. Over all classes,
            of which it has the experts'.
        index: ids of the experts chosen, `[T, K]`; others than 0 to E - 1 are no experts.
        weight: their weights, `[T, K]`.
    """

    layer: MoeLayer
    logits: Tensor
    affinity: Tensor
    index: Tensor
    weight: Tensor


@dataclass
class _Seen:
    """References to what one layer's router was given and returned, use by use."""

    logits: list[Tensor | None] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)  # where there were no logits
    choices: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class RouterWatch:
    """Watches the routers of some layers while a model runs.

    Routers that look experts up by the token's id (DeepSeek-V4's first layers) choose nothing, and
    are left out.

    Args:
        layers: of a model, see `esft.moe.moe_layers`; taken before PEFT wraps it.

    Raises:
        ModelError: a layer has no router beside its experts, or none of them chooses.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.layers = tuple(x for x in layers if not hasattr(x.router, "tid2eid"))
        if not self.layers:
            raise ModelError("all routers look experts up by token id: there is none to train")
        self._score = {layer.name: _score_function(layer) for layer in self.layers}
        self._recomputed: set[str] = set()  # layers whose logits were found to fit the choices

    @contextmanager
    def watching(self) -> Iterator[dict[str, _Seen]]:
        """Watch the forward pass in the block; give what it yields to `passes` afterwards."""
        seen = {layer.name: _Seen() for layer in self.layers}
        with ExitStack() as hooks:
            for layer in self.layers:
                here = seen[layer.name]
                source = _source(layer).register_forward_hook(partial(_keep, layer, here))
                hooks.callback(source.remove)
                keep_choice = partial(_keep_choice, here)
                hooks.callback(layer.layout.observe(keep_choice).remove)
            yield seen

    def passes(self, seen: dict[str, _Seen], tokens: int) -> list[RouterPass]:
        """Return what was seen, layer by layer; a layer that ran twice is there twice.

        Args:
            seen: from `watching`.
            tokens: how many the batch has, B * S.

        Raises:
            ModelError: a router computed something else than logits for each token.
        """
        found = []
        for layer in self.layers:
            here = seen[layer.name]
            if not here.logits or len(here.logits) != len(here.choices):
                raise ModelError(
                    f"{layer.name}: its router was called {len(here.logits)} times and its experts "
                    f"{len(here.choices)} times; set the recipe's losses to 0 for this family"
                )
            for logits, x, (index, weight) in zip(
                here.logits, here.inputs, here.choices, strict=True
            ):
                anew = logits is None
                if logits is None:
                    logits = _logits_anew(layer, x)
                logits_TC = logits.reshape(-1, logits.shape[-1])
                index_TK, weight_TK = (x.reshape(-1, x.shape[-1]) for x in (index, weight))
                if not len(logits_TC) == len(index_TK) == tokens:
                    raise ModelError(
                        f"{layer.name}: its router computed {len(logits_TC)} rows of logits and "
                        f"{len(index_TK)} choices for {tokens} tokens; set the recipe's losses to "
                        f"0 for this family"
                    )
                affinity_TE = self._affinity(layer, logits_TC)
                if anew and layer.name not in self._recomputed:
                    _check_anew(layer, affinity_TE, index_TK, weight_TK)
                    self._recomputed.add(layer.name)
                found.append(RouterPass(layer, logits_TC, affinity_TE, index_TK, weight_TK))
        return found

    def _affinity(self, layer: MoeLayer, logits_TC: Tensor) -> Tensor:
        wide = logits_TC.to(torch.promote_types(logits_TC.dtype, torch.float32))
        score_TC = self._score[layer.name](wide)
        return (score_TC / score_TC.sum(dim=-1, keepdim=True))[:, : layer.num_experts]


def _keep(layer: MoeLayer, seen: _Seen, _module: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        raise RecipeError(
            "training.gradient_checkpointing_kwargs: losses of routers need use_reentrant: false; "
            "the reentrant kind computes a layer without gradients first"
        )
    logits = _logits_in(layer, output)
    seen.logits.append(logits)
    seen.inputs.append(args[0] if logits is None and args else None)


def _keep_choice(seen: _Seen, index: Tensor, weight: Tensor) -> None:
    seen.choices.append((index, weight))


def _source(layer: MoeLayer) -> nn.Module:
    """Return the module whose output has the logits: the router, but for one that hides them."""
    router = layer.router
    if router is None:
        raise ModelError(f"{layer.name}: no router beside these experts; its losses must be 0")
    # It returns probabilities.
    return router.proj if is_a(router, "Gemma4TextRouter") else router  # type: ignore[return-value]


def _logits_in(layer: MoeLayer, output: Any) -> Tensor | None:
    """Return the first tensor that looks like logits; None if there is none."""
    tensors = list(output) if isinstance(output, tuple) else [output]
    if layer.router is not None and is_a(layer.router, "Llama4Router"):
        tensors = tensors[1:]  # gates, scattered over all experts, come first
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
            continue
        if _is_for_classes(layer, tensor.shape[-1]):
            return tensor
    return None


def _is_for_classes(layer: MoeLayer, size: int) -> bool:
    """Whether a tensor of this size has one entry for each class that a router tells apart."""
    return size == layer.num_experts or (layer.layout.others and size > layer.num_experts)


def _logits_anew(layer: MoeLayer, x: Tensor | None) -> Tensor:
    """Compute logits from a router's input, where the router returns its choices only."""
    router: Any = layer.router
    names = {name.rpartition(".")[2]: name for name, _ in router.named_parameters()}
    # Read as the router reads them: what trains may be kept in another dtype.
    found = {own: operator.attrgetter(name)(router) for own, name in names.items()}
    weight, bias = found.pop("weight", None), found.pop("bias", None)
    linear = weight is not None and weight.dim() == 2 and _is_for_classes(layer, len(weight))
    if x is None or found or not linear:
        raise ModelError(
            f"{layer.name}: its router returns no logits for its {layer.num_experts} experts, and "
            f"they cannot be computed from its weights; set the recipe's losses to 0"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def _check_anew(layer: MoeLayer, affinity_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
    """Make sure that affinities computed anew are those behind the router's weights."""
    with torch.no_grad():
        real_TK = (index_TK >= 0) & (index_TK < layer.num_experts)
        expected_TK = affinity_TE.gather(1, index_TK.where(real_TK, 0))
        shares = []
        for x_TK in (expected_TK, weight_TK.to(affinity_TE.dtype)):
            x_TK = x_TK * real_TK
            shares.append(x_TK / x_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9))
        off = (shares[0] - shares[1]).abs().amax()
    if not off <= _TOLERANCE:
        raise ModelError(
            f"{layer.name}: its router returns no logits, and does not weigh by the softmax or "
            f"sigmoid of its input times its weight; set the recipe's losses to 0"
        )


def _score_function(layer: MoeLayer) -> Callable[[Tensor], Tensor]:
    """Return what the router makes scores with: softmax, sigmoid or a function of its own."""
    router = layer.router
    own = getattr(router, "score_fn", None)
    if callable(own):
        return own
    named = [getattr(router, name, None) for name in ("expert_selection_fn", "scoring_func")]
    steps = next((name for name in named if isinstance(name, str)), layer.scoring)
    if "sigmoid" in steps:
        return torch.sigmoid
    return partial(torch.softmax, dim=-1)

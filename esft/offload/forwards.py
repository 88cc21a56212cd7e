"""How a layer computes with few experts at hand: as its family does, one expert at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from esft.errors import ModelError
from esft.layouts import GatedInputLayout, InterfaceLayout
from esft.layouts.stacks import DbrxLayout, LongcatLayout, Step3Layout
from esft.moe import MoeLayer
from esft.offload.cache import ExpertCache
from esft.offload.speculation import Speculation
from esft.offload.weights import Weights, dense

IMPLEMENTATION = "esft_offload"

# An expert's output `[M, H]` for rows `[M, H]` of its input.
Expert = Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class OffloadedLayer:
    """What a layer computes with instead of stacks. Lives at `esft_offloaded` of its experts.

    Attributes:
        place: the layer's position among those with experts.
        num_experts: E.
        cache: of the whole model.
        speculation: of the whole model.
    """

    place: int
    num_experts: int
    cache: ExpertCache
    speculation: Speculation

    def rows(
        self, experts: nn.Module, expert: Expert, x_NH: Tensor, index_N: Tensor, repeat: int = 1
    ) -> Tensor:
        """Return the output of the chosen expert for each row: `[N, H]`.

        Args:
            experts: the module.
            expert: computes one.
            x_NH: a row for each choice, or for each `repeat` of them.
            index_N: expert ids; rows of other ids come out as 0.
            repeat: choices for each row of x: K.
        """
        ids, order = index_N.sort(stable=True)
        found, counts = ids.unique_consecutive(return_counts=True)
        rows = dict(zip(found.tolist(), order.split(counts.tolist()), strict=True))
        rows = {e: own for e, own in rows.items() if 0 <= e < self.num_experts}
        # The most used come last: those stay in the cache.
        needed = sorted(rows, key=lambda e: len(rows[e]))
        out_NH = x_NH.new_zeros(len(index_N), x_NH.shape[-1])

        def use(chosen: int, weights: Weights) -> None:
            own = rows[chosen]
            plain = dense(weights)
            dtype = next(iter(plain.values())).dtype
            x = x_NH.index_select(0, own.div(repeat, rounding_mode="floor")).to(dtype)
            out_NH[own] = expert(experts, x, plain).to(out_NH.dtype)

        self.speculation.judge(self.place, needed)
        self.cache.visit(self.place, needed, use, lambda: self.speculation.look_ahead(self.place))
        return out_NH


def check_served(layer: MoeLayer) -> None:
    """Refuse experts whose computation cannot be done one expert at a time.

    Raises:
        ModelError: says why.
    """
    if type(layer.layout) not in _INSTALL:
        raise ModelError(
            f"{layer.name}: --expert-memory serves experts behind transformers' experts interface, "
            f"and those of Llama 4, DBRX, LongCat-Flash and Step-3; this family's code takes its "
            f"experts in another way"
        )
    layer.layout.refuse_unsupported()


def install(layer: MoeLayer, offloaded: OffloadedLayer) -> None:
    """Let a layer's experts be fetched when they are needed, in place of its own stacks."""
    experts: Any = layer.experts
    experts.esft_offloaded = offloaded
    _INSTALL[type(layer.layout)](layer)


def _install_interface(layer: MoeLayer) -> None:
    # The interface dispatches on the module's config: with a copy of its own, this layer alone
    # changes.
    config = copy.copy(layer.experts.config)
    config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    layer.experts.config = config


def _install_called(expert: Expert) -> Callable[[MoeLayer], None]:
    """Replace the forward of experts that are called as behind the interface."""

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Any:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return _sum(self, expert, x_TH, top_k_index, top_k_weights).view(hidden_states.shape)

    def install_forward(layer: MoeLayer) -> None:
        layer.experts.forward = MethodType(forward, layer.experts)

    return install_forward


def _install_gated_input(layer: MoeLayer) -> None:
    layer.layout.block.forward = MethodType(_llama4_block, layer.layout.block)


def _sum(self: Any, expert: Expert, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Weigh and add up each token's experts, in the order and the dtype that transformers does."""
    offloaded: OffloadedLayer = self.esft_offloaded
    K = index_TK.shape[-1]
    y_NH = offloaded.rows(self, expert, x_TH, index_TK.reshape(-1), repeat=K)
    weighted_NH = y_NH * weight_TK.reshape(-1, 1)
    return weighted_NH.view(x_TH.shape[0], K, -1).sum(dim=1).to(x_TH.dtype)


def _interface_expert(self: Any, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    def linear(rows: Tensor, name: str) -> Tensor:
        weight, bias = weights[name], weights.get(f"{name}_bias")
        y = rows @ (weight if self.is_transposed else weight.t())
        return y if bias is None else y + bias

    if self.has_gate:
        return linear(self._apply_gate(linear(x, "gate_up_proj")), "down_proj")
    return linear(self.act_fn(linear(x, "up_proj")), "down_proj")


def _interface_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module. Signature of the experts interface."""
    return _sum(self, _interface_expert, hidden_states, top_k_index, top_k_weights)


def _dbrx_expert(self: Any, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    out: Tensor = self.mlp(x, weights["mlp.w1"], weights["mlp.v1"], weights["mlp.w2"])
    return out


def _step3_expert(self: Any, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    inner = self._apply_gate(F.linear(x, weights["gate_up_proj"]))
    return F.linear(inner, weights["down_proj"])


def _longcat_expert(self: Any, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    gate, up = F.linear(x, weights["gate_up_proj"]).chunk(2, dim=-1)
    return F.linear(self.act_fn(gate) * up, weights["down_proj"])


def _longcat_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run `LongcatFlashExperts`: ids from E on return their input."""
    routed = _sum(self, _longcat_expert, hidden_states, top_k_index, top_k_weights)
    itself = top_k_weights.masked_fill(top_k_index < self.num_routed_experts, 0)
    return routed + hidden_states * itself.sum(-1, keepdim=True).to(hidden_states.dtype)


def _install_longcat(layer: MoeLayer) -> None:
    layer.experts.forward = MethodType(_longcat_forward, layer.experts)


def _llama4_expert(self: Any, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    gate, up = (x @ weights["gate_up_proj"]).chunk(2, dim=-1)
    return (up * self.act_fn(gate)) @ weights["down_proj"]


def _llama4_block(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Run a `Llama4TextMoe`: the gate multiplies an expert's input."""
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores_TE, logits_TE = self.router(x_TH)
    index_TK = logits_TE.topk(self.router.top_k, dim=-1).indices
    weight_TK = scores_TE.gather(-1, index_TK)
    rows_NH = (x_TH[:, None] * weight_TK[..., None]).flatten(0, 1)
    offloaded: OffloadedLayer = self.experts.esft_offloaded
    out_NH = offloaded.rows(self.experts, _llama4_expert, rows_NH, index_TK.reshape(-1))
    routed_TH = out_NH.view(*index_TK.shape, -1).sum(dim=1)
    return self.shared_expert(x_TH) + routed_TH, logits_TE


_INSTALL: dict[type, Callable[[MoeLayer], None]] = {
    InterfaceLayout: _install_interface,
    GatedInputLayout: _install_gated_input,
    DbrxLayout: _install_called(_dbrx_expert),
    LongcatLayout: _install_longcat,
    Step3Layout: _install_called(_step3_expert),
}

ExpertsInterface.register(IMPLEMENTATION, _interface_forward)

"""Attach a selection to a model: each layer's experts in two banks, behind the experts interface.

The selected experts become small parameters of their own, in fp32, and everything else is frozen.
No gradient, gradient buffer or optimizer state of another expert can then exist, because there is
no parameter that could hold it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp
from esft_kernels.bank import frozen_ids, slot_map
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from esft.errors import ModelError, SelectionError
from esft.moe import MoeLayer, moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.selection import Selection

IMPLEMENTATION = "esft"


class AttachedExperts(nn.Module):
    """A layer's stacked expert weights, split by a selection. Lives at `experts.esft`.

    Attributes:
        selected: ids of the n experts that train, in the selection's order.
        trainable: name of the stacked parameter -> `[n, ...]`, the only ones with a gradient.
        frozen: name of the stacked parameter -> `[E - n, ...]`, by ascending id.
        slot: `[E]` int64, see `esft_kernels.ExpertBank`.
    """

    slot: Tensor
    hook: RemovableHandle

    def __init__(
        self, stacked: dict[str, Tensor], selected: list[int], param_dtype: torch.dtype
    ) -> None:
        super().__init__()
        first = next(iter(stacked.values()))
        num_experts, device = first.shape[0], first.device
        self.selected = list(selected)
        chosen = torch.tensor(selected, dtype=torch.int64, device=device)
        rest = torch.tensor(frozen_ids(selected, num_experts), dtype=torch.int64, device=device)
        self.trainable = nn.ParameterDict()
        self.frozen = nn.ParameterDict()
        for name, weight in stacked.items():
            weight = weight.detach()
            # A layer without a selected expert keeps its stack as it is, uncopied.
            frozen = weight.index_select(0, rest) if selected else weight
            trainable = weight.index_select(0, chosen).to(param_dtype)
            self.trainable[name] = nn.Parameter(trainable, requires_grad=bool(selected))
            self.frozen[name] = nn.Parameter(frozen, requires_grad=False)
        slot = slot_map(selected, num_experts, device)
        self.register_buffer("slot", slot, persistent=False)

    def stacked(self, name: str) -> Tensor:
        """Return one stack in the experts' own order and the frozen bank's dtype: `[E, ...]`."""
        frozen = self.frozen[name].detach()
        trained = self.trainable[name].detach().to(frozen.dtype)
        return torch.cat([trained, frozen]).index_select(0, self.slot)


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module. Signature of the experts interface."""
    bank = _attached_bank(self) if hasattr(self, "esft") else _whole_bank(self)
    return moe_mlp(hidden_states, top_k_index, top_k_weights, bank)


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)


def _attached_bank(experts: nn.Module) -> ExpertBank:
    """Return the banks of a module that has a selection attached."""
    attached: AttachedExperts = experts.esft  # type: ignore[assignment]
    return _bank(experts, dict(attached.trainable), dict(attached.frozen), attached.slot)


def _whole_bank(experts: nn.Module) -> ExpertBank:
    """Return a module's own stacks as one bank: of `experts_implementation="esft"` by itself."""
    stacks = dict(experts.named_parameters(recurse=False))
    none = {name: stack[:0] for name, stack in stacks.items()}
    trains = any(stack.requires_grad for stack in stacks.values())
    trainable, frozen = (stacks, none) if trains else (none, stacks)
    first = next(iter(stacks.values()))
    slot = torch.arange(first.shape[0], device=first.device)
    return _bank(experts, trainable, frozen, slot)


def _bank(
    experts: nn.Module,
    trainable: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    slot: Tensor,
) -> ExpertBank:
    """Put two banks together as `moe_mlp` takes them, with the layout of the experts module."""

    def projection(name: str) -> Projection:
        bias = f"{name}_bias"
        return Projection(
            trainable[name],
            frozen[name],
            bool(experts.is_transposed),
            trainable.get(bias),
            frozen.get(bias),
        )

    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return ExpertBank(projection(up), projection("down_proj"), slot, _activation(experts))


def _activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what an experts module applies between its projections."""
    if not experts.has_gate:
        return experts.act_fn  # type: ignore[return-value]
    apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
    stock = getattr(apply_gate, "__func__", None) is _default_apply_gate
    if stock and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
        return SwiGLU()  # the same function, under the name that the kernels know
    return apply_gate


@dataclass(frozen=True)
class AttachedLayer:
    """An MoE layer and the banks attached to it."""

    layer: MoeLayer
    banks: AttachedExperts


def attach(
    model: PreTrainedModel, selection: Selection, *, param_dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Make a model train the selected experts and nothing else. Changes the model in place.

    Every parameter is frozen; in each MoE layer the selected experts move into a trainable bank
    `[n, ...]` and the others into a frozen one. Gradients still flow through the frozen experts
    and the gate values to earlier layers.

    Args:
        model: a model with routed experts, with no selection attached yet.
        selection: which experts train, by the model's own layer index.
        param_dtype: of the trainable bank. float32 keeps updates that bf16 would round away.

    Returns:
        the same model.

    Raises:
        ModelError: the model is dense or not supported, or has a selection attached already.
        SelectionError: the selection names a layer or an expert that the model does not have.
    """
    layers = moe_layers(model)
    if any(hasattr(layer.experts, "esft") for layer in layers):
        raise ModelError("this model has a selection attached already; detach it first")
    if selection.shared_experts or selection.non_expert_modules:
        raise SelectionError(
            "shared_experts and non_expert_modules of a selection cannot be trained yet; "
            "set both to false"
        )
    selection.check_against({layer.index: layer.num_experts for layer in layers})
    for layer in layers:
        _refuse_unsupported(layer)
    model.requires_grad_(False)
    for layer in layers:
        _attach_layer(layer, selection.experts.get(layer.index, []), param_dtype)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Put the trained experts back into the stacked parameters. Changes the model in place.

    The trainable bank is rounded to the dtype of the frozen one. What comes out is an ordinary
    transformers model, all of its parameters frozen.

    Raises:
        ModelError: no selection is attached.
    """
    for attached in attached_layers(model):
        experts = attached.layer.experts
        for name in list(attached.banks.frozen):
            weight = nn.Parameter(attached.banks.stacked(name), requires_grad=False)
            experts.register_parameter(name, weight)
        experts.config = attached.banks.original_config
        attached.banks.hook.remove()
        del experts.esft
    return model


def attached_layers(model: nn.Module) -> list[AttachedLayer]:
    """Return the MoE layers with their banks, by ascending index.

    Raises:
        ModelError: no selection is attached.
    """
    found = [
        AttachedLayer(layer, layer.experts.esft)  # type: ignore[arg-type]
        for layer in moe_layers(model)
        if hasattr(layer.experts, "esft")
    ]
    if not found:
        raise ModelError("no selection is attached to this model")
    return found


def _restack(experts: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Show the stacks under their own names in a state dict, so that `save_pretrained` is right."""
    banks: AttachedExperts = experts.esft  # type: ignore[assignment]
    for name in [key for key in state if key.startswith(f"{prefix}esft.")]:
        del state[name]
    for name in banks.frozen:
        state[prefix + name] = banks.stacked(name)


def _refuse_unsupported(layer: MoeLayer) -> None:
    experts = layer.experts
    if getattr(experts, "has_post_expert_norm", False):
        raise ModelError(f"{layer.name}: experts with a norm after them are not supported yet")
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(f"{layer.name}: expert parallelism is not supported yet")
    for name, weight in experts.named_parameters(recurse=False):
        if weight.shape[0] != layer.num_experts or not weight.is_floating_point():
            raise ModelError(
                f"{layer.name}.{name}: not a float stack of {layer.num_experts} experts "
                f"(shape {list(weight.shape)}, {weight.dtype}); quantised experts cannot train"
            )


def _attach_layer(layer: MoeLayer, selected: list[int], param_dtype: torch.dtype) -> None:
    experts = layer.experts
    stacked: dict[str, Tensor] = dict(experts.named_parameters(recurse=False))
    banks = AttachedExperts(stacked, selected, param_dtype)
    for name in stacked:
        del experts._parameters[name]
    experts.esft = banks
    banks.hook = experts.register_state_dict_post_hook(_restack)
    # The interface dispatches on the module's config: with a copy of its own, this layer alone
    # changes, and the model's config keeps what the user asked for.
    banks.original_config = experts.config
    config = copy.copy(experts.config)
    config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    experts.config = config

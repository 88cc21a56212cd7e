"""Experts that are modules of their own, in a list: code that came with a checkpoint, mostly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.banks import TrainedExperts, touched
from esft.errors import ModelError
from esft.layouts.layout import Layout, Seen, beside, is_a, parent


class ModulesLayout(Layout):
    """A `ModuleList` or `ModuleDict` called `experts`, of E modules that are alike.

    Nothing is moved or copied but the selected experts' weights, into parameters `[n, ...]`; while
    the block runs, each selected expert computes with its slice, cast to the dtype of the rest.
    """

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> ModulesLayout | None:
        """See `Layout.find`."""
        experts = modules[name]
        if (
            not isinstance(experts, nn.ModuleList | nn.ModuleDict)
            or name.split(".")[-1] != "experts"
        ):
            return None
        kinds = {type(expert) for expert in experts.children()}
        if len(experts) < 2 or len(kinds) != 1:
            return None
        layout = SwitchLayout if is_a(experts, "SwitchTransformersExperts") else ModulesLayout
        return layout(name, experts, modules[parent(name)], len(experts))

    @property
    def host(self) -> nn.Module:
        """The block: a list is not called, and has no room for anything but experts."""
        return self.block

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts within the list, by id."""
        return tuple(name for name, _ in self.experts.named_children())

    def shapes(self) -> dict[str, torch.Size]:
        """See `Layout.shapes`."""
        E, banks = self.num_experts, self.banks
        if banks is not None and banks.selected:
            return {name: torch.Size([E, *banks.bank(name).shape[1:]]) for name in banks.names}
        first = self._expert(0)
        return {name: torch.Size([E, *p.shape]) for name, p in first.named_parameters()}

    def weights(self) -> dict[str, Sequence[Tensor]]:
        """See `Layout.weights`."""
        return {
            name: [expert.get_parameter(name).detach() for expert in self.experts.children()]
            for name in self.shapes()
        }

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """See `Layout.tensor_names`."""
        return tuple(f"{self.name}.{expert}.{name}" for expert in self.expert_names)

    @property
    def gate_scale(self) -> float:
        """See `Layout.gate_scale`."""
        return 1.0 if self._normalises else super().gate_scale

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        if self.router is None:
            raise ModelError(f"{self.name}: no router beside these experts; cannot be profiled")

        @beside
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            index, weight = self._choices(output)
            # Of such routers some multiply by their constant factor and some do not: the sum of a
            # token's gate values is 1 before it.
            seen(index, weight / weight.sum(-1, keepdim=True) if self._normalises else weight)

        return self.router.register_forward_hook(hook)

    def attach(self, selected: list[int], param_dtype: torch.dtype | None) -> None:
        """See `Layout.attach`."""
        chosen = [self._expert(expert) for expert in selected]
        names = [name for name, _ in chosen[0].named_parameters()] if chosen else []
        stacks = {
            name: torch.stack([expert.get_parameter(name).detach() for expert in chosen])
            for name in names
        }
        banks = TrainedExperts(stacks, selected, param_dtype)
        banks.dtypes = {name: stack.dtype for name, stack in stacks.items()}
        for name in names:
            for expert in chosen:
                owner, own = _owner(expert, name)
                del owner._parameters[own]
        self.block.esft = banks
        banks.hooks = [
            self.block.register_forward_pre_hook(_take),
            self.block.register_forward_hook(_give_back),
            self.block.register_state_dict_post_hook(_show_experts),
        ]
        _release(self.block)

    def detach(self) -> None:
        """See `Layout.detach`."""
        for expert, name, value in _final(self.block):
            owner, own = _owner(expert, name)
            delattr(owner, own)
            owner.register_parameter(own, nn.Parameter(value, requires_grad=False))
        banks: Any = self.banks
        banks.unhook()
        del self.block.esft

    def refuse_unsupported(self) -> None:
        """See `Layout.refuse_unsupported`."""
        shapes = self.shapes()
        for number, expert in enumerate(self.experts.children()):
            own = dict(expert.named_parameters())
            if {name: p.shape for name, p in own.items()} != {
                name: shape[1:] for name, shape in shapes.items()
            } or not all(p.is_floating_point() for p in own.values()):
                raise ModelError(
                    f"{self.name}: expert {number} is not a float module like the first; experts "
                    f"of different kinds, and quantised ones, cannot train"
                )

    @property
    def _normalises(self) -> bool:
        top_k = getattr(self.router, "top_k", 1)
        return bool(getattr(self.router, "norm_topk_prob", False)) and top_k > 1

    def _choices(self, output: Any) -> tuple[Tensor, Tensor]:
        """Return ids and weights, `[T, K]`, from what a router of the checkpoint's code returns."""
        tensors = [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple) else []
        for index in tensors:
            for weight in tensors:
                whole = not index.is_floating_point() and weight.is_floating_point()
                if whole and index.dim() >= 2 and index.shape == weight.shape:
                    return index, weight
        raise ModelError(
            f"{self.name}: its router does not return which experts it chose with which weights "
            f"(as DeepSeek's does: topk_idx, topk_weight); this model's code cannot be profiled"
        )

    def _expert(self, number: int) -> nn.Module:
        return self.experts.get_submodule(self.expert_names[number])


class SwitchLayout(ModulesLayout):
    """Switch Transformers: a dict of modules, one of them for each token, as far as it has room.

    Gate values are those of the choice, also where the expert's capacity was used up before the
    token: that depends on the other tokens of the text, and on nothing that the expert is.
    """

    top_k = 1

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        router: Any = self.router

        @beside
        def chosen(module: Any, _args: Any, output: Any) -> None:
            _, gate_BS1, logits_BSE = output
            if logits_BSE.shape[-1] != self.num_experts:
                raise ModelError(
                    f"{self.name}: this version of transformers has routers of Switch Transformers "
                    f"that do not return their logits; cannot be profiled, use a newer one"
                )
            # As the router does it, before it looks at capacities.
            likely_BSE = logits_BSE.softmax(-1).to(module.input_dtype)
            seen(likely_BSE.argmax(-1, keepdim=True), gate_BS1)

        return router.register_forward_hook(chosen)


def _owner(expert: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, own = name.rpartition(".")
    return expert.get_submodule(module), own


def _selected(block: Any) -> list[nn.Module]:
    experts = list(block.experts.children())
    return [experts[number] for number in block.esft.selected]


# What runs while a selection is attached is found from the block alone, so that a copy of the
# model works by itself.


def _take(block: Any, *_: object) -> None:
    """Give each selected expert its weights for the forward pass to come, in the others' dtype."""
    banks = block.esft
    for name in banks.names:
        slices = banks.trained(name).unbind()
        for expert, weight in zip(_selected(block), slices, strict=True):
            owner, own = _owner(expert, name)
            setattr(owner, own, weight.to(banks.dtypes[name]))


def _release(block: Any) -> None:
    """Leave each selected expert its weights without the graph of the last forward pass."""
    banks = block.esft
    for name in banks.names:
        slices = banks.trained(name).detach().unbind()
        for expert, weight in zip(_selected(block), slices, strict=True):
            owner, own = _owner(expert, name)
            setattr(owner, own, weight)


def _give_back(block: Any, _args: object, output: Any) -> Any:
    _release(block)
    return touched(block.esft, output)


def _final(block: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the selected experts' modules, the names of their weights, and these as saved."""
    banks = block.esft
    for name in banks.names:
        values = banks.trained(name).detach().to(banks.dtypes[name])
        for expert, value in zip(_selected(block), values, strict=True):
            yield expert, name, value.clone()


def _show_experts(block: Any, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Show trained weights under the experts' own names in a state dict."""
    for name in [key for key in state if key.startswith(f"{prefix}esft.")]:
        del state[name]
    paths = {module: path for path, module in block.named_modules()}
    for expert, name, value in _final(block):
        state[f"{prefix}{paths[expert]}.{name}"] = value

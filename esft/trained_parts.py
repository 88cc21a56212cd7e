"""What may train beside the selected experts: the rest of a model, in three parts.

Every parameter of a model is either a routed expert's or of exactly one part:

- `router`: the modules that choose a layer's experts (`gate`, `router`) with all that is in them:
  weights, biases, scales, and the correction that is added to an expert's score for the choice
  alone (`e_score_correction_bias`), which some families keep as a buffer; also where that stands
  in the block beside the router (`expert_bias`).
- `shared_experts`: the modules of an MoE layer that every token goes through beside the chosen
  experts (`shared_experts`, `shared_expert`, `shared_mlp`), with their gates
  (`shared_expert_gate`).
- `non_expert_modules`: everything else. Attention, norms, embeddings, dense MLP layers, the output
  layer, towers for images and sound; also experts that cannot be selected, as in JetMoE's
  attention.

In the official ESFT configuration `non_expert_modules` means everything that is no expert, the
router too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from esft.moe import MoeLayer
    from esft.selection import Selection

SHARED_EXPERTS = "shared_experts"
NON_EXPERT_MODULES = "non_expert_modules"
ROUTER = "router"
PARTS = (SHARED_EXPERTS, NON_EXPERT_MODULES, ROUTER)


@dataclass(frozen=True)
class TrainedParts:
    """Which parts of a model train."""

    shared_experts: bool = False
    non_expert_modules: bool = False
    router: bool = False

    @classmethod
    def of(
        cls,
        selection: Selection | None,
        shared_experts: bool | None = None,
        non_expert_modules: bool | None = None,
        router: bool | None = None,
    ) -> Self:
        """Return what is asked for; where None, what the selection's own flags say.

        A selection has no flag for the router: it is one of its non-expert modules.
        """
        flags = cls() if selection is None else selection
        if router is None:
            router = non_expert_modules is None and flags.non_expert_modules
        return cls(
            flags.shared_experts if shared_experts is None else shared_experts,
            flags.non_expert_modules if non_expert_modules is None else non_expert_modules,
            router,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that train, as `PARTS` calls them."""
        return tuple(part for part in PARTS if getattr(self, part))


def parameter_parts(model: nn.Module, layers: Sequence[MoeLayer]) -> dict[str, str]:
    """Return the part of each parameter that is no routed expert's, by name; tied ones by each.

    Args:
        model: with a selection attached or without.
        layers: its MoE layers.
    """
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return dict(_parts(model, layers, names))


def router_buffers(model: nn.Module, layers: Sequence[MoeLayer]) -> dict[str, Tensor]:
    """Return the buffers of floating-point numbers in the routers that a checkpoint stores."""
    stored = {
        f"{path}.{own}": buffer
        for path, module in model.named_modules(remove_duplicate=False)
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set and buffer.is_floating_point()
    }
    parts = _parts(model, layers, iter(stored))
    return {name: stored[name] for name, part in parts if part == ROUTER}


def _parts(
    model: nn.Module, layers: Sequence[MoeLayer], names: Iterator[str]
) -> Iterator[tuple[str, str]]:
    paths = {module: path for path, module in model.named_modules()}
    routed: set[str] = set()
    corrections: set[str] = set()
    banks, shared, routers = [], [], []
    for layer in layers:
        layout = layer.layout
        for weight in layout.shapes():
            routed.update(layout.tensor_names(weight))
        banks.append(f"{paths[layout.host]}.esft.")
        for path in layer.shared:
            shared += [f"{path}.", f"{path}_gate."]
        if layout.router is not None:
            routers.append(f"{paths[layout.router]}.")
        # One number for each expert, held by the block itself: what corrects the choice.
        own = {**layout.block._parameters, **layout.block._buffers}
        corrections.update(
            f"{paths[layout.block]}.{name}"
            for name, tensor in own.items()
            if tensor is not None and tensor.numel() == layer.num_experts
        )
    for name in names:
        if name in routed or name.startswith(tuple(banks)):
            continue
        if name.startswith(tuple(shared)):
            yield name, SHARED_EXPERTS
        elif name in corrections or name.startswith(tuple(routers)):
            yield name, ROUTER
        else:
            yield name, NON_EXPERT_MODULES

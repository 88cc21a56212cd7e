"""A model's MoE anatomy: which layers have routed experts, how many, and who routes to them.

Found by capability, not by a list of model types: an experts module is one whose class went
through transformers' experts interface (`use_experts_implementation`), which gives it the layout
flags `is_transposed`, `is_concatenated`, `has_gate`, `has_bias` and one stacked parameter per
projection, `[E, ...]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from typing import Any

from torch import nn

from esft.errors import ModelError
from esft.loading import load_skeleton

# Why families of transformers that have routed experts are refused. A family is also refused,
# with a general reason, when its config counts experts but no module follows the interface.
_REFUSED = {
    "dbrx": "its experts are stacked in 2-D weights, outside transformers' experts interface",
    "doge": "its experts are embedding rows, not feed-forward networks",
    "jetmoe": "its experts do not go through transformers' experts interface",
    "llama4_text": "it applies the gate to an expert's input, outside the experts interface",
    "longcat_flash": "its experts do not go through transformers' experts interface",
}
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
_GATE_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_SHARED = re.compile(r"(^|\.)shared_(experts?|mlp)$")


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer with routed experts.

    Attributes:
        index: the model's own layer index, as in `layers.<index>`.
        name: path of the experts module in the model, `model.layers.1.mlp.experts`.
        experts: the experts module; called as `experts(x_TH, top_k_index_TK, top_k_weight_TK)`.
        router: the module beside it that chooses the experts, or None if there is none.
        num_experts: E.
        top_k: K.
        gate_scale: constant factor that the router multiplies into the weights (DeepSeek's
            `routed_scaling_factor`); gate values are the weights divided by it.
        shared: paths of the layer's shared experts.
    """

    index: int
    name: str
    experts: nn.Module
    router: nn.Module | None
    num_experts: int
    top_k: int
    gate_scale: float
    shared: tuple[str, ...]

    @property
    def scoring(self) -> str:
        """The router's steps in order, such as `softmax, topk`, read from its source."""
        return "unknown" if self.router is None else _scoring(type(self.router))


@dataclass(frozen=True)
class Anatomy:
    """What `esft inspect` tells about a model; all sizes in parameters.

    Attributes:
        model_type: transformers' name of the family.
        architecture: class name of the model.
        layers: the layers with routed experts, by ascending index.
        total: all parameters, tied ones counted once.
        routed: parameters in routed experts.
        shared: parameters in shared experts.
        per_expert: parameters of one routed expert of the first MoE layer.
    """

    model_type: str
    architecture: str
    layers: tuple[MoeLayer, ...]
    total: int
    routed: int
    shared: int
    per_expert: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "model_type": self.model_type,
            "architecture": self.architecture,
            "parameters": self.total,
            "routed_parameters": self.routed,
            "shared_parameters": self.shared,
            "expert_parameters": self.per_expert,
            "layers": {
                str(layer.index): {
                    "name": layer.name,
                    "experts": layer.num_experts,
                    "top_k": layer.top_k,
                    "scoring": layer.scoring,
                    "gate_scale": layer.gate_scale,
                    "shared": list(layer.shared),
                }
                for layer in self.layers
            },
        }


def inspect(model: str | Path | nn.Module) -> Anatomy:
    """Describe a model from its configuration alone, without reading its weights.

    Args:
        model: a checkpoint's folder, a hub id, `tiny-moe`, or a model.

    Raises:
        ModelError: the model is dense, or of a family that esft cannot train.
    """
    return anatomy(model if isinstance(model, nn.Module) else load_skeleton(model))


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module holds a layer's routed experts and follows the experts interface."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def moe_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """Find a model's MoE layers, by ascending layer index.

    Raises:
        ModelError: the model is dense, or of a family that esft cannot train.
    """
    modules = dict(model.named_modules())
    config = text_config(model)
    layers = []
    for name, module in modules.items():
        if not is_experts_module(module):
            continue
        block_name = name.rpartition(".")[0]
        router = _router(modules[block_name])
        layers.append(
            MoeLayer(
                index=_layer_index(name),
                name=name,
                experts=module,
                router=router,
                num_experts=_num_experts(module),
                top_k=_top_k(router, config),
                gate_scale=_gate_scale(router),
                shared=_shared_names(modules, name),
            )
        )
    if not layers:
        raise ModelError(_why_refused(config))
    layers.sort(key=lambda layer: layer.index)
    indices = [layer.index for layer in layers]
    if len(set(indices)) != len(indices):
        raise ModelError(f"{config.model_type}: a layer has more than one experts module")
    return tuple(layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Describe a model. Works on a model on the meta device too.

    Raises:
        ModelError: as `moe_layers`.
    """
    layers = moe_layers(model)
    modules = dict(model.named_modules())
    routed = sum(_size(layer.experts) for layer in layers)
    shared = sum(_size(modules[name]) for layer in layers for name in layer.shared)
    return Anatomy(
        model_type=text_config(model).model_type,
        architecture=type(model).__name__,
        layers=layers,
        total=_size(model),
        routed=routed,
        shared=shared,
        per_expert=_size(layers[0].experts) // layers[0].num_experts,
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, also inside a multimodal wrapper."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_index(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ModelError(f"{name}: cannot tell which layer this experts module belongs to")
    return int(numbers[0])


def _num_experts(experts: nn.Module) -> int:
    stacked = [p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3]
    return stacked[0] if stacked else int(experts.num_experts)  # type: ignore[arg-type]


def _router(block: nn.Module) -> nn.Module | None:
    # transformers calls it `gate` or `router`; both name a linear layer in some dense blocks,
    # but those have no experts module beside them.
    for name in ("gate", "router"):
        child = getattr(block, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


def _top_k(router: nn.Module | None, config: Any) -> int:
    value = getattr(router, "top_k", None)
    names = iter(_TOP_K)
    while not isinstance(value, int):
        name = next(names, None)
        if name is None:
            raise ModelError(f"{config.model_type}: cannot tell how many experts a token uses")
        value = getattr(config, name, None)
    return value


def _gate_scale(router: nn.Module | None) -> float:
    # On the router it is multiplied into the weights that the experts receive; a factor that
    # lives on the block is applied to the experts' output, where the weights do not show it.
    for name in _GATE_SCALES:
        value = getattr(router, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return 1.0


def _shared_names(modules: dict[str, nn.Module], experts_name: str) -> tuple[str, ...]:
    block = experts_name.rpartition(".")[0]
    layer = block.rpartition(".")[0]
    return tuple(
        name
        for name in modules
        if _SHARED.search(name) and name.rpartition(".")[0] in (block, layer)
    )


def _scoring(router: type[nn.Module]) -> str:
    try:
        source = getsource(router)
    except (OSError, TypeError):
        return "unknown"
    steps = {word: source.find(word) for word in ("softmax(", "sigmoid(", "topk(", "sparsemixer(")}
    found = sorted((place, word[:-1]) for word, place in steps.items() if place >= 0)
    return ", ".join(word for _, word in found) or "unknown"


def _why_refused(config: Any) -> str:
    kind = config.model_type
    if kind in _REFUSED:
        return f"{kind}: esft cannot train this family yet: {_REFUSED[kind]}"
    counts = [getattr(config, name, None) for name in _EXPERT_COUNTS]
    if any(isinstance(count, int) and count > 1 for count in counts):
        return (
            f"{kind}: esft cannot train this family: its config counts experts, but none of its "
            f"modules follows transformers' experts interface"
        )
    return (
        f"{kind}: this model is dense; esft specialises models with routed experts "
        f"(Qwen3-MoE, DeepSeek, OLMoE, Mixtral, gpt-oss and others)"
    )

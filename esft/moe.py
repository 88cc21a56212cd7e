"""A model's MoE anatomy: which layers have routed experts, how many, and who routes to them.

Found by capability where transformers has an interface for it, see `esft.layouts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from typing import Any

from torch import nn

from esft.errors import ModelError
from esft.layouts import Layout, find_layout
from esft.loading import load_skeleton
from esft.trained_parts import NON_EXPERT_MODULES, PARTS, ROUTER, SHARED_EXPERTS, parameter_parts

# Why families of transformers that have routed experts are refused, by the type of their language
# model's config. A family is also refused, with a general reason, when its config counts experts
# but no module is known to hold them.
_REFUSED = {
    "nllb-moe": "in transformers all tokens go to its experts 0 and 1, whatever its routers choose "
    "(NllbMoeExperts takes a mask for expert ids)",
    "doge": "its experts are embedding rows, looked up by product keys, not feed-forward networks",
    "diffusion_gemma_text": "it fills a canvas of noise instead of going on with a text, and is "
    "not trained on the next token",
    "ernie4_5_vl_moe_text": "a checkpoint has a layer's experts for text and those for images in "
    "one list, which transformers splits when it loads them: esft cannot tell which files hold "
    "what",
    "muse_spark_text": "each expert's output goes through a norm before it is weighed, which "
    "esft's kernels do not have",
}
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
_SHARED = re.compile(r"(^|\.)shared_(experts?|mlp)$")


@dataclass(frozen=True)
class MoeLayer:
    """One layer with routed experts.

    Attributes:
        index: the model's own layer index, as in `layers.<index>`; in a model with more than one
            list of layers, see `_numbers`.
        layout: where the experts' weights are, how they are called and seen.
        top_k: K.
        shared: paths of the layer's shared experts.
    """

    index: int
    layout: Layout
    top_k: int
    shared: tuple[str, ...]

    @property
    def name(self) -> str:
        """Path of the experts in the model, `model.layers.1.mlp.experts`."""
        return self.layout.name

    @property
    def experts(self) -> nn.Module:
        """The module at that path."""
        return self.layout.experts

    @property
    def router(self) -> nn.Module | None:
        """The module that chooses the experts, or None if there is none beside them."""
        return self.layout.router

    @property
    def num_experts(self) -> int:
        """How many routed experts there are: E."""
        return self.layout.num_experts

    @property
    def gate_scale(self) -> float:
        """A constant that the router multiplies into the weights (`routed_scaling_factor`).

        Gate values are the weights divided by it.
        """
        return self.layout.gate_scale

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
        parts: parameters in the rest of the model, by part, see `esft.trained_parts`.
        per_expert: parameters of one routed expert of the first MoE layer.
    """

    model_type: str
    architecture: str
    layers: tuple[MoeLayer, ...]
    total: int
    routed: int
    parts: Mapping[str, int]
    per_expert: int

    @property
    def shared(self) -> int:
        """Parameters in shared experts and their gates."""
        return self.parts[SHARED_EXPERTS]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "model_type": self.model_type,
            "architecture": self.architecture,
            "parameters": self.total,
            "routed_parameters": self.routed,
            "shared_parameters": self.shared,
            "router_parameters": self.parts[ROUTER],
            "non_expert_parameters": self.parts[NON_EXPERT_MODULES],
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


def moe_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """Find a model's MoE layers, by ascending layer index.

    Raises:
        ModelError: the model is dense, or of a family that esft cannot train.
    """
    modules = dict(model.named_modules())
    config = text_config(model)
    layouts = [layout for name in modules if (layout := find_layout(name, modules)) is not None]
    if not layouts or config.model_type in _REFUSED:
        raise ModelError(_why_refused(config))
    numbers = _numbers([layout.name for layout in layouts], modules)
    layers = [
        MoeLayer(
            index=numbers[layout.name],
            layout=layout,
            top_k=_top_k(layout, config),
            shared=_shared_names(modules, layout),
        )
        for layout in layouts
    ]
    layers.sort(key=lambda layer: layer.index)
    return tuple(layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Describe a model. Works on a model on the meta device too.

    Raises:
        ModelError: as `moe_layers`.
    """
    layers = moe_layers(model)
    sizes = [layer.num_experts * _expert_size(layer) for layer in layers]
    part_of = parameter_parts(model, layers)
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if name in part_of:
            parts[part_of[name]] += parameter.numel()
    return Anatomy(
        model_type=text_config(model).model_type,
        architecture=type(model).__name__,
        layers=layers,
        total=sum(parameter.numel() for parameter in model.parameters()),
        routed=sum(sizes),
        parts=parts,
        per_expert=_expert_size(layers[0]),
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, also inside a multimodal wrapper."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _expert_size(layer: MoeLayer) -> int:
    return sum(shape[1:].numel() for shape in layer.layout.shapes().values())


def _numbers(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Number the experts of a model by the first number in their path: the layer's own.

    Where a second list of layers has experts too (the decoder after the encoder), or a layer has
    two kinds of experts, the numbers of the second go on after the last layer of the first.

    Raises:
        ModelError: a path has no number.
    """
    places = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            raise ModelError(f"{name}: cannot tell which layer these experts belong to")
        places[name] = ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])
    twice = {layers for (layers, _), n in Counter(p[:2] for p in places.values()).items() if n > 1}
    numbers: dict[str, int] = {}
    first: dict[tuple[str, str], int] = {}
    following = 0
    for name, (layers, number, kind) in places.items():
        key = layers, kind if layers in twice else ""
        if key not in first:
            first[key] = following
            following += len(modules[layers])  # type: ignore[arg-type]
        numbers[name] = first[key] + number
    return numbers


def _top_k(layout: Layout, config: Any) -> int:
    owners: list[tuple[Any, str]] = [
        (layout, "top_k"),
        (layout.router, "top_k"),
        (layout.block, "top_k"),
    ]
    for owner, name in owners + [(config, name) for name in _TOP_K]:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ModelError(f"{config.model_type}: cannot tell how many experts a token uses")


def _shared_names(modules: dict[str, nn.Module], layout: Layout) -> tuple[str, ...]:
    block = layout.name if layout.block is layout.experts else layout.name.rpartition(".")[0]
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
        return f"{kind}: esft cannot train this family: {_REFUSED[kind]}"
    counts = [getattr(config, name, None) for name in _EXPERT_COUNTS]
    if any(isinstance(count, int) and count > 1 for count in counts):
        return (
            f"{kind}: esft cannot train this family: its config counts experts, but none of its "
            f"modules follows transformers' experts interface, or another layout that esft knows"
        )
    return (
        f"{kind}: this model is dense; esft specialises models with routed experts "
        f"(Qwen3-MoE, DeepSeek, OLMoE, Mixtral, gpt-oss and others)"
    )

"""How many floating-point operations a training run takes, by formula.

A product of T rows with a matrix of n numbers takes 2 T n operations: one multiplication and one
addition a number (Kaplan et al., arXiv 2001.08361, section 2.1). Training does up to three of them
for each matrix that a token meets:

1. forward;
2. backward, the gradient of what came in: for every matrix above the lowest parameter that trains,
   because the gradient has to get down there, and for none below it;
3. backward, the gradient of the weights: only where they train.

A token meets its K experts of E, the shared ones, and everything else. Of the K experts a share
trains, that of the router's choices which fall on selected experts (the token scores of a profile).
The output layer is met by tokens that have a label, which are all that logits are computed for; an
input embedding is looked up, which takes no operations. Attention's scores and the sum that they
weigh take 2 T S (q + v) operations forward for a context of S tokens, q and v being the widths of
all heads together, and twice that backward (arXiv 2204.02311, appendix B, which likewise does not
halve it for the causal mask). Norms, activations, softmax and the optimizer's step are left out:
they are a few operations a number, where matrices have hundreds or thousands.

LoRA's factors beside a linear layer are matrices like others. Those of stacked experts (PEFT's
`target_parameters`, and the factors of hot-expert LoRA) are multiplied out into a weight once a
pass, whatever the number of tokens: 2 r times the weight's size forward (PEFT 0.19 does this twice;
once is counted), and twice that backward, for which the gradient of the whole weight is needed. So
here LoRA saves memory, not operations.
Recomputing activations (`gradient_checkpointing`) adds one forward pass of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from esft import processes
from esft.data.packing import TrainSet
from esft.layouts import Layout
from esft.moe import MoeLayer, text_config
from esft.quantising.linear import QuantisedLinear
from esft.scores import Scores
from esft.selection import Selection

if TYPE_CHECKING:
    from esft.run.trainer import EsftTrainer

# Where in the model: before the layers, in one of them (attention 0, experts 1), or after them.
_Place = tuple[float, int]
_BEFORE: _Place = (-1, 0)
_AFTER: _Place = (float("inf"), 0)

# Kinds of layers, as configurations name them, whose scores do not grow with the context.
_WITHOUT_SCORES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class Work:
    """What a run has passed through its model.

    Attributes:
        tokens: padding included where rows are packed.
        labelled: those of them that have a label.
        context: how many tokens stand in the same row or packed block as a token, on average.
        passes: forward and backward passes: micro-batches.
        recomputed: whether the layers' activations are computed again for the backward pass.
    """

    tokens: int
    labelled: float
    context: float
    passes: int
    recomputed: bool = False

    @classmethod
    def on(cls, data: TrainSet, *, tokens: int, passes: int, recomputed: bool = False) -> Work:
        """Return the work on some tokens of a training set, labelled as the set is on average."""
        lengths = data.lengths
        return cls(
            tokens=tokens,
            labelled=tokens * data.supervised / sum(lengths),
            context=sum(length**2 for length in lengths) / sum(lengths),
            passes=passes,
            recomputed=recomputed,
        )


@dataclass(frozen=True)
class _Matrix:
    """A weight and how much of it a token meets.

    Attributes:
        size: numbers that a token is multiplied by.
        place: of it in the model.
        trained: share of the products whose weight gradient is computed.
        inside: share of them whose input's gradient is computed where nothing below trains.
        labelled: whether it meets labelled tokens only.
    """

    size: float
    place: _Place
    trained: float
    inside: float
    labelled: bool = False


def training_flops(
    model: nn.Module,
    layers: Sequence[MoeLayer],
    work: Work,
    shares: Mapping[int, float] | None = None,
) -> float:
    """Return the floating-point operations of training a model. See the module for the formula.

    Weights that a model uses at several depths count once. In the lowest block that trains, the
    gradient of what came in is counted for every matrix but the routed experts' (where the exact
    number is known), though the first ones do not need it: too much by less than that block's
    forward pass.

    Args:
        model: ready to train, as a method's `prepare` returns it, or trained.
        layers: the model's MoE layers, found before it was prepared.
        work: what it was trained on.
        shares: layer -> share of the router's choices that fall on experts which train, see
            `selected_shares`; None takes it that all experts are chosen equally often.
    """
    wrapped = _wrapped(model)
    places = _places(model, layers)
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        return 0.0
    lowest = min(places[name] for name in trained)
    routed = {id(weight) for layer in layers for weight in _routed(layer.layout)}
    dense_trains = any(
        places[name] == lowest and id(parameters[name]) not in routed for name in trained
    )
    matrices = [
        *_dense(model, parameters, places, routed, wrapped, inside=float(dense_trains)),
        *(_experts(layer, wrapped, shares) for layer in layers),
    ]
    total = 0.0
    for matrix in matrices:
        rows = work.labelled if matrix.labelled else work.tokens
        back = 1.0 if matrix.place > lowest else matrix.inside if matrix.place == lowest else 0.0
        again = float(work.recomputed and _BEFORE < matrix.place < _AFTER)
        total += 2 * rows * matrix.size * (1 + again + back + matrix.trained)
    for index, width in _attention(model):
        back = 2.0 * ((index, 0) > lowest or ((index, 0) == lowest and dense_trains))
        length = min(work.context, width.window or work.context)
        total += 2 * work.tokens * length * width.numbers * (1 + work.recomputed + back)
    factors = sum(wrapped.values()) + sum(_bank_factors(layer.layout) for layer in layers)
    return total + work.passes * factors * (3 + work.recomputed)


def run_flops(
    trainer: EsftTrainer,
    data: TrainSet,
    layers: Sequence[MoeLayer],
    scores: Scores | None,
    selection: Selection | None,
    *,
    recomputed: bool = False,
) -> float:
    """Return the operations of a run that has ended, what came before a resumption included.

    Args:
        trainer: has trained.
        data: what it learnt from.
        layers: as for `training_flops`.
        scores: of the task, which tell how often the selected experts are chosen.
        selection: the experts that trained, if any were selected.
        recomputed: see `Work`.
    """
    args, state = trainer.args, trainer.state
    work = Work.on(
        data,
        tokens=state.num_input_tokens_seen,
        passes=state.global_step * args.gradient_accumulation_steps * processes.count(),
        recomputed=recomputed,
    )
    shares = None
    if scores is not None and selection is not None:
        shares = selected_shares(scores, selection)
    return training_flops(trainer.model, layers, work, shares)


def selected_shares(scores: Scores, selection: Selection) -> dict[int, float]:
    """Return for each layer the share of the router's choices that fall on selected experts."""
    return {
        layer: sum(scores.layers[layer].token[expert] for expert in ids)
        / (sum(scores.layers[layer].token) or 1.0)
        for layer, ids in selection.experts.items()
    }


def _dense(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, _Place],
    routed: set[int],
    wrapped: Mapping[int, float],
    *,
    inside: float,
) -> Iterator[_Matrix]:
    """Yield every matrix that each token meets once."""
    # Looked up, or multiplied out once a pass.
    others = _looked_up(model)
    others |= {id(weight) for module in model.modules() for weight in _wrapper_factors(module)}
    output = model.get_output_embeddings()  # type: ignore[operator]
    # PEFT's wrappers of a layer have its weight; one in few bits would be read for nothing.
    none = output is None or isinstance(output, QuantisedLinear)
    head = None if none else output.weight
    for name, weight in parameters.items():
        if weight.dim() < 2 or id(weight) in routed or id(weight) in others or weight is head:
            continue
        trains = float(weight.requires_grad or id(weight) in wrapped)
        yield _Matrix(weight.numel(), places[name], trains, inside)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear) and module is not output:
            yield _Matrix(module.stored.shape.numel(), places[name], 0.0, inside)
    if output is not None:  # also where it is the input embedding, too
        size = output.in_features * output.out_features if head is None else head.numel()
        trains = float(head is not None and head.requires_grad)
        yield _Matrix(size, _AFTER, trains, inside, labelled=True)


def _experts(
    layer: MoeLayer, wrapped: Mapping[int, float], shares: Mapping[int, float] | None
) -> _Matrix:
    """Return a layer's routed experts as one matrix."""
    layout, banks = layer.layout, layer.layout.banks
    sizes = [shape[1:].numel() for shape in layout.shapes().values() if len(shape) > 2]
    if banks is None:
        weights = list(_routed(layout))
        trained = float(any(w.requires_grad or id(w) in wrapped for w in weights))
    elif shares is None or not banks.selected:
        trained = len(banks.selected) / layer.num_experts
    else:
        trained = shares[layer.index]
    # The last projection's input comes from the one before it, which wants its gradient.
    inside = trained * sizes[-1] / sum(sizes)
    return _Matrix(layer.top_k * sum(sizes), _place(layer.name, 1), trained, inside)


def _routed(layout: Layout) -> Iterator[nn.Parameter]:
    """Yield the parameters of a layer's routed experts, and of their factors."""
    if layout.banks is not None:
        yield from layout.banks.parameters()
        return
    own = dict(layout.experts.named_parameters())
    for weight in layout.shapes():
        for name in layout.tensor_names(weight):
            yield own[name.removeprefix(f"{layout.name}.")]


def _bank_factors(layout: Layout) -> float:
    """Return the operations of multiplying out the factors of selected experts once."""
    if layout.banks is None:
        return 0.0
    return sum(
        2.0 * left.numel() * right.shape[-1]
        for factors in layout.banks.low_rank.values()
        for left, right in zip(factors.left, factors.right, strict=True)  # type: ignore[arg-type]
    )


def _wrapped(model: nn.Module) -> dict[int, float]:
    """Return the operations of multiplying PEFT's factors out once, by the weight's identity."""
    found = {}
    for module in model.modules():
        if any(True for _ in _wrapper_factors(module)):
            wrapper: Any = module
            weight = wrapper.get_param()
            rank = sum(wrapper.r[name] for name in wrapper.active_adapters)
            found[id(weight)] = 2.0 * rank * weight.numel()
    return found


def _wrapper_factors(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the factors of PEFT's wrapper of a parameter; nothing of other modules."""
    if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
        yield from module.lora_A.parameters()  # type: ignore[union-attr]
        yield from module.lora_B.parameters()  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Width:
    """Attention of a layer: what a pair of tokens costs, and how far it looks back, if limited."""

    numbers: int
    window: int | None


def _attention(model: nn.Module) -> Iterator[tuple[int, _Width]]:
    """Yield each layer that has attention scores."""
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "qk_nope_head_dim", None):  # latent attention
        numbers = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        numbers = 2 * width
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    windows = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    for index, kind in enumerate(kinds):
        if kind not in _WITHOUT_SCORES:
            yield index, _Width(heads * numbers, windows.get(kind))


def _places(model: nn.Module, layers: Sequence[MoeLayer]) -> dict[str, _Place]:
    """Return where each parameter is, and each linear layer whose weight is none."""
    blocks = [layer.layout.block for layer in layers]
    with_experts = {id(p) for block in blocks for p in block.parameters()}
    with_experts |= {id(module) for block in blocks for module in block.modules()}
    looked_up = _looked_up(model)
    places = {
        name: _BEFORE
        if id(parameter) in looked_up
        else _place(name, int(id(parameter) in with_experts))
        for name, parameter in model.named_parameters()
    }
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            places[name] = _place(name, int(id(module) in with_experts))
    return places


def _looked_up(model: nn.Module) -> set[int]:
    """Return the identities of the weights that are looked up, and not multiplied by."""
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(module._parameters.get("weight")) for module in modules}


def _place(name: str, part: int) -> _Place:
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return _AFTER if number is None else (number, part)

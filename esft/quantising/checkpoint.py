"""Load a checkpoint for training with its frozen weights in few bits, piece by piece.

Each frozen matrix is quantised as it is read, so that at no time there is more in memory than the
quantised model and one matrix, or one expert, as it was stored. What trains is read as it is: the
selected experts begin as the base has them, to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from esft_kernels.bank import frozen_ids
from esft_kernels.quantised import Quantised, quantise
from torch import Tensor, nn

from esft.banks import Split
from esft.errors import ModelError
from esft.layouts.layout import UNREAD
from esft.loading import check_loadable, pick_device, pick_dtype
from esft.moe import MoeLayer
from esft.quantising.deltas import LOADED_SO
from esft.quantising.embedding import QuantisedEmbedding
from esft.quantising.linear import QuantisedLinear
from esft.quantising.parts import EXPERTS, stored_kinds
from esft.weight_source import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.trained_parts import TrainedParts


def load_quantised(
    folder: Path,
    kinds: Mapping[str, str],
    trained: TrainedParts,
    *,
    device: str | None = None,
    dtype: str = "auto",
) -> PreTrainedModel:
    """Load a model whose frozen weights are in few bits.

    Where the experts are among them, the model cannot run yet: `esft.attach` reads its experts,
    those of the selection as they are and the others into few bits.

    Args:
        folder: of the checkpoint.
        kinds: `int8` or `nf4` by part, see `esft.recipe_sections.FrozenSpec`.
        trained: what will train beside the selected experts, and so stays as it is.
        device: see `esft.loading.pick_device`.
        dtype: that the model computes in, see `esft.loading.pick_dtype`.

    Raises:
        ModelError: the checkpoint cannot be loaded, is quantised itself, or has experts that
            cannot be kept so; or a weight is NaN or infinite.
    """
    place = pick_device(device)
    check_loadable(folder)
    source = WeightSource.open(folder, pick_dtype(dtype, place))
    stored = stored_kinds(source.model, source.layers, kinds, trained)
    if not stored:
        raise ModelError(
            f"{folder}: frozen_dtype: nothing of {', '.join(kinds)} is frozen in this run"
        )
    if EXPERTS in kinds:
        for layer in source.layers:
            read = partial(_read_split, source, layer, kinds[EXPERTS], place)
            layer.layout.host.__dict__[UNREAD] = read
    experts = source.expert_names
    for names in tied_names(source.model):
        if EXPERTS in kinds and names[0] in experts:
            continue
        (value,) = source.read(names[:1]).values()
        if names[0] in stored and names[0] not in experts:
            weight = _quantised(names[0], value.to(place), stored[names[0]])
            for name in names:
                replace_weight(source.model, name.removesuffix(".weight"), weight)
        else:
            source.put({names[0]: value.to(place)})
    source.move_buffers(place)
    setattr(source.model, LOADED_SO, dict(kinds))
    return source.model


def tied_names(model: nn.Module) -> Iterable[list[str]]:
    """Yield the names of each parameter and stored buffer, of tied ones together."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return list(names.values())


def _read_split(
    source: WeightSource,
    layer: MoeLayer,
    kind: str,
    device: torch.device,
    selected: list[int],
) -> Split:
    """Read a layer's experts one after the other, the selected ones as they are."""
    chosen: dict[str, Tensor] = {}
    rest: dict[str, Tensor | Quantised] = {}
    for weight, shape in layer.layout.shapes().items():
        inner, dtype = shape[1:], source.dtype(*layer.layout.tensor_names(weight))
        others = (shape[0] - len(selected), *inner)
        chosen[weight] = torch.empty(len(selected), *inner, dtype=dtype, device=device)
        rest[weight] = (
            Quantised.empty(others, kind, dtype=dtype, device=device)
            if len(inner) > 1  # biases are small, and stay
            else torch.empty(others, dtype=dtype, device=device)
        )
    slot = {expert: place for place, expert in enumerate(selected)}
    place_of = {e: place for place, e in enumerate(frozen_ids(selected, layer.num_experts))}
    for expert in range(layer.num_experts):
        for weight, value in source.read_expert(layer, expert).items():
            bank = rest[weight]
            if expert in slot:
                chosen[weight][slot[expert]] = value
            elif isinstance(bank, Quantised):
                name = f"{layer.name}.{weight}, expert {expert}"
                bank[place_of[expert]].copy_(_quantised(name, value.to(device), kind))
            else:
                bank[place_of[expert]] = value
    return Split(chosen, rest)


def _quantised(name: str, value: Tensor, kind: str) -> Quantised:
    try:
        return quantise(value, kind)
    except ValueError as error:
        raise ModelError(f"tensor {name} cannot be kept in {kind}: {error}") from error


def replace_weight(model: nn.Module, path: str, weight: Quantised) -> None:
    """Put a module that reads its weight where there is an ordinary one without it."""
    old = model.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = QuantisedEmbedding(weight, old.padding_idx)
    else:
        bias: Tensor | None = old.bias  # type: ignore[assignment]
        new = QuantisedLinear(weight, bias)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, new.train(old.training))

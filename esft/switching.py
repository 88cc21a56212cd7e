"""Several deltas on one loaded model: switched in microseconds, mixed row by row in a batch.

A loaded delta adds its experts' weights beside the model's own stacks, which stay where they are,
whole and uncopied. Which of the two an expert id means is a table, so that switching is choosing a
row of the table, and each row of a batch may choose its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from esft_kernels import moe_mlp
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from esft.delta import Delta, read_delta
from esft.delta_experts import held_experts, value_of
from esft.errors import DeltaError, ModelError, nearest
from esft.layouts.interface import InterfaceLayout, expert_bank
from esft.locating import resolve
from esft.moe import MoeLayer, moe_layers
from esft.names import layer_parts
from esft.quantising.deltas import refuse_few_bits
from esft.shards import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "esft_switching"


class _Chosen:
    """Which delta each row of the batch uses; shared by all layers of a model.

    Attributes:
        names: of the loaded deltas; delta d of the table is `names[d - 1]`, 0 is the base.
        rows: `[B]` int64 numbers of deltas, or `[1]` for all rows.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows = torch.zeros(1, dtype=torch.int64)


class _LoadedExperts(nn.Module):
    """The experts of all loaded deltas in one layer. Lives at `experts.esft_deltas`.

    Attributes:
        chosen: see `_Chosen`.
        table: `[D + 1, E]` int64: the slot of each expert under each delta. Slots number the
            loaded experts, n in all deltas together, before the model's own E.
        stacks: name of a stack -> the loaded experts' weights `[n, ...]`.
    """

    table: Tensor

    def __init__(self, experts: nn.Module, num_experts: int, chosen: _Chosen) -> None:
        super().__init__()
        self.chosen = chosen
        own = dict(experts.named_parameters(recurse=False))
        device = next(iter(own.values())).device
        # Buffers follow the model to another device, and stay out of what it saves.
        self.register_buffer(
            "table", torch.arange(num_experts, device=device)[None], persistent=False
        )
        self.names = list(own)
        for name, stack in own.items():
            self.register_buffer(name, stack.detach()[:0], persistent=False)
        self.original_config = experts.config

    @property
    def stacks(self) -> dict[str, Tensor]:
        """The loaded experts' weights by stack."""
        return {name: self.get_buffer(name) for name in self.names}

    def add(self, ids: list[int], stacks: dict[str, Tensor]) -> None:
        """Append a delta: the weights `[len(ids), ...]` of its experts in each stack."""
        before, added = self.get_buffer(self.names[0]).shape[0], len(ids)
        for name, stack in stacks.items():
            setattr(self, name, torch.cat([self.get_buffer(name), stack]))
        # The model's own experts move behind the new ones.
        table = torch.where(self.table < before, self.table, self.table + added)
        mine = table[:1].clone()
        mine[0, ids] = torch.arange(before, before + added, device=table.device)
        self.table = torch.cat([table, mine])


def load_delta(
    model: PreTrainedModel,
    delta: str | Path,
    name: str | None = None,
    *,
    base: str | Path | None = None,
) -> PreTrainedModel:
    """Load a delta beside a model's own weights; `set_active` turns it on.

    Args:
        model: loaded from the delta's base, no selection attached. Changed in place; its own
            weights are neither changed nor copied.
        delta: a delta's folder, of the methods `esft`, `random` or `hot-lora`.
        name: what `set_active` calls it; default the folder's name.
        base: the checkpoint that the model was loaded from; default what the model says.

    Returns:
        the same model.

    Raises:
        CheckError: the delta was made from another base.
        DeltaError: it is damaged, changes more than routed experts, or its name is taken; or the
            model's own weights are in few bits.
        ModelError: the model cannot take deltas.
    """
    opened = read_delta(Path(delta))
    name = name or Path(delta).resolve().name
    refuse_few_bits(model, opened)
    layers = _supported(moe_layers(model))
    loaded = _loaded(layers[0])
    if loaded is not None and name in loaded.chosen.names:
        raise DeltaError(f'a delta called "{name}" is loaded already; give another name')
    if opened.is_adapter:
        raise DeltaError(f"{delta}: a LoRA adapter cannot be switched here; load it with PEFT")
    source = open_checkpoint(resolve(base or model.config._name_or_path))
    opened.check_base(source)
    with opened.plain(source) as plain:
        found = _expert_weights(model, layers, plain)
    chosen = _prepare(layers)
    for layer in layers:
        loaded = _loaded(layer)
        assert loaded is not None  # _prepare put it there
        loaded.add(*found[layer.index])
    chosen.names.append(name)
    return model


def set_active(model: nn.Module, active: str | Sequence[str | None] | None) -> None:
    """Choose the delta that a model computes with, or one for each row of the batch.

    Args:
        model: with deltas loaded.
        active: a name, or None for the base; or a sequence of these, `[B]`, as many as the rows of
            the batches to come (before beams or returned sequences multiply them).

    Raises:
        DeltaError: no such delta is loaded.
    """
    layers = moe_layers(model)
    loaded = _loaded(layers[0])
    if loaded is None:
        raise DeltaError("no delta is loaded; call load_delta first")
    chosen = loaded.chosen
    wanted = [active] if active is None or isinstance(active, str) else list(active)
    if not wanted:
        raise DeltaError("set_active: no row; give a name, or one for each row of the batch")
    numbers = {None: 0} | {name: number for number, name in enumerate(chosen.names, start=1)}
    for name in wanted:
        if name not in numbers:
            known = ", ".join(chosen.names)
            raise DeltaError(
                f'no delta called "{name}" is loaded{nearest(str(name), chosen.names)}; '
                f"loaded: {known}"
            )
    chosen.rows = torch.tensor([numbers[name] for name in wanted])
    for layer in layers:
        # Without a delta the model runs as it did before, by its own implementation.
        _use(layer.experts, IMPLEMENTATION if any(chosen.rows) else None)


def disable(model: nn.Module) -> None:
    """Compute with the base alone; loaded deltas stay loaded.

    Raises:
        DeltaError: none is loaded.
    """
    set_active(model, None)


@contextmanager
def active(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """Choose deltas inside a block, as `set_active` does; afterwards the base computes alone."""
    set_active(model, names)
    try:
        yield
    finally:
        disable(model)


def unload_deltas(model: nn.Module) -> None:
    """Take all deltas off a model again: it is what it was before the first `load_delta`."""
    for layer in moe_layers(model):
        if _loaded(layer) is not None:
            _use(layer.experts, None)
            del layer.experts.esft_deltas


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module with deltas. Signature of the experts interface."""
    loaded: _LoadedExperts = self.esft_deltas  # type: ignore[assignment]
    own = dict(self.named_parameters(recurse=False))
    E, tokens = loaded.table.shape[1], hidden_states.shape[0]
    rows = loaded.chosen.rows.to(top_k_index.device)
    if tokens % len(rows):
        raise DeltaError(
            f"set_active named {len(rows)} rows, but the batch has {tokens} tokens, which is no "
            f"multiple; name a delta for each row of the batch"
        )
    # Expert e under delta d has the id d * E + e.
    offset = (rows * E).repeat_interleave(tokens // len(rows))
    bank = expert_bank(self, loaded.stacks, own, loaded.table.flatten())
    return moe_mlp(hidden_states, top_k_index + offset[:, None], top_k_weights, bank)


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)


def _supported(layers: Sequence[MoeLayer]) -> Sequence[MoeLayer]:
    for layer in layers:
        if layer.layout.banks is not None:
            raise ModelError("this model has a selection attached; detach it before loading deltas")
        if not isinstance(layer.layout, InterfaceLayout):
            raise ModelError(
                f"{layer.name}: these experts do not go through transformers' experts interface; "
                f"deltas cannot be switched on them; merge the delta instead"
            )
        layer.layout.refuse_unsupported()
    return layers


def _loaded(layer: MoeLayer) -> _LoadedExperts | None:
    return getattr(layer.experts, "esft_deltas", None)


def _prepare(layers: Sequence[MoeLayer]) -> _Chosen:
    """Give each layer a place for deltas, unless it has one; return what they share."""
    loaded = _loaded(layers[0])
    if loaded is not None:
        return loaded.chosen
    chosen = _Chosen()
    for layer in layers:
        layer.experts.esft_deltas = _LoadedExperts(layer.experts, layer.num_experts, chosen)
    return chosen


def _use(experts: nn.Module, implementation: str | None) -> None:
    """Dispatch a module to an implementation, or to the one that its model's config names.

    The interface dispatches on the module's config: with a copy of its own, this module alone
    changes.
    """
    loaded: Any = experts.esft_deltas
    if implementation is None:
        experts.config = loaded.original_config
        return
    config = copy.copy(loaded.original_config)
    config._experts_implementation = implementation
    experts.config = config


def _expert_weights(
    model: PreTrainedModel, layers: Sequence[MoeLayer], delta: Delta
) -> dict[int, tuple[list[int], dict[str, Tensor]]]:
    """Read a delta's experts: by layer index, their ids and their weights in each stack.

    Raises:
        DeltaError: the delta has a tensor that is not a routed expert's.
    """
    left = set(delta.entries)
    found = {}
    for layer in layers:
        places = layer_parts(model, layer)
        ids = sorted(
            {e for group in places.values() for part in group for e in held_experts(part, delta)}
        )
        stacks = {}
        for stack, slices in layer.layout.weights().items():
            weights = (
                torch.stack([slices[expert] for expert in ids]) if ids else slices[0][None][:0]
            )
            for part in places[stack]:
                left.difference_update(part.names)
                held = set(held_experts(part, delta))
                for place, expert in enumerate(ids):
                    if expert in held:
                        part.write(weights[place], value_of(part, delta, expert))
            stacks[stack] = weights
        found[layer.index] = ids, stacks
    if left:
        raise DeltaError(
            f"{delta.folder}: tensor {min(left)} is not a routed expert's: a delta is switched by "
            f"choosing its experts, row by row, and there is no choice of such a tensor; merge the "
            f"delta instead"
        )
    return found

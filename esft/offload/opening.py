"""A model made ready with less memory than its routed experts take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esft.loading import check_loadable, pick_device, pick_dtype
from esft.offload.cache import ExpertCache, Place
from esft.offload.expert_memory import ExpertMemory
from esft.offload.figures import OffloadFigures
from esft.offload.forwards import OffloadedLayer, check_served, install
from esft.offload.pinning import delta_experts, opened_delta, put_others
from esft.offload.speculation import Speculation
from esft.offload.split import Split, split
from esft.offload.stores import (
    CheckpointStore,
    ExpertStore,
    FileStore,
    PinnedStore,
    QuantisingStore,
)
from esft.offload.weights import Weights, moved, weight_bytes
from esft.progress import SILENT, Reporter
from esft.report import numerals
from esft.weight_source import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Offloaded:
    """What runs beside a model whose experts are elsewhere. Lives at its `esft_offload`."""

    def __init__(
        self, store: ExpertStore, cache: ExpertCache, speculation: Speculation, hooks: Iterable[Any]
    ) -> None:
        self._store, self._cache, self._speculation = store, cache, speculation
        self._hooks = list(hooks)

    def close(self) -> None:
        """End the thread and give back memory and files; the model computes no more."""
        for hook in self._hooks:
            hook.remove()
        self._speculation.close()
        self._cache.close()
        self._store.close()


def open_offloaded(
    folder: Path,
    memory: ExpertMemory,
    *,
    delta: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    reporter: Reporter = SILENT,
) -> PreTrainedModel:
    """Load a model but for its routed experts, which are fetched when they are needed.

    On a CPU they stay in the checkpoint, or, quantised, in a temporary file; for a GPU they are in
    page-locked memory of the host. Call `close_offloaded` when the model is not used any more.

    Args:
        folder: of the checkpoint.
        memory: how much memory experts may take; its figures are added to while the model runs.
        delta: folder of a delta made from this checkpoint. Its experts stay at hand, exact.
        device: see `esft.loading.pick_device`.
        dtype: see `esft.loading.pick_dtype`.
        reporter: told what is stored where, and shown progress.

    Raises:
        EsftError: the memory is less than what one token needs; names the least.
        ModelError: the checkpoint cannot be loaded, or its family is not served.
        DeltaError: the delta is damaged, or an adapter.
        CheckError: the delta was made from another base.
        OutputError: the disk is full.
    """
    place = pick_device(device)
    check_loadable(folder)
    source = WeightSource.open(folder, pick_dtype(dtype, place))
    for layer in source.layers:
        check_served(layer)
    base = CheckpointStore(source)
    store: ExpertStore = QuantisingStore(base, memory.bits) if memory.bits < 16 else base
    parts = _divide(memory, source, store, {})  # before anything long is done
    pinned: dict[Place, Weights] = {}
    experts = source.expert_names
    if delta is None:
        source.fill(name for name in source.names if name not in experts)
    else:
        with opened_delta(source, delta) as opened:
            pinned = delta_experts(source, opened)
            parts = _divide(memory, source, store, pinned)
            source.fill(name for name in source.names if name not in experts)
            put_others(source, opened)
    if place.type != "cpu":
        _move(source, place)
        pinned = {key: moved(weights, place) for key, weights in pinned.items()}
        store = PinnedStore(store, source.layers, reporter)
    elif memory.bits < 16:
        store = FileStore(store, source.layers, reporter)
    _install(source, store, parts, pinned, memory, place)
    memory.figures.store_bytes = stored_bytes(source, store)
    reporter.note(_told(source, store, parts, memory))
    return source.model


def close_offloaded(model: Any) -> None:
    """Give back what a model of `open_offloaded` took; nothing to do for another model."""
    offloaded: Offloaded | None = getattr(model, "esft_offload", None)
    if offloaded is not None:
        offloaded.close()
        del model.esft_offload


def stored_bytes(source: WeightSource, store: ExpertStore) -> int:
    """Return the bytes of all experts where they are stored."""
    if isinstance(store, CheckpointStore):
        return source.stored_bytes(source.expert_names)
    return sum(layer.num_experts * weight_bytes(store.shape(layer)) for layer in source.layers)


def _divide(
    memory: ExpertMemory, source: WeightSource, store: ExpertStore, pinned: dict[Place, Weights]
) -> Split:
    exact = CheckpointStore(source)
    return split(
        memory.budget,
        experts={layer.index: layer.num_experts for layer in source.layers},
        expert_bytes=max(weight_bytes(store.shape(layer)) for layer in source.layers),
        top_k=max(layer.top_k for layer in source.layers),
        ahead=memory.ahead,
        keep=memory.keep,
        pinned_bytes=sum(map(weight_bytes, pinned.values())),
        scratch_bytes=max(weight_bytes(exact.shape(layer)) for layer in source.layers)
        if memory.bits < 16
        else 0,
    )


def _install(
    source: WeightSource,
    store: ExpertStore,
    parts: Split,
    pinned: dict[Place, Weights],
    memory: ExpertMemory,
    device: torch.device,
) -> None:
    layers, figures = source.layers, memory.figures
    cache = ExpertCache(store, layers, parts, figures, pinned=pinned, device=device)
    ahead = memory.ahead if parts.staging else 0
    speculation = Speculation(layers, cache, ahead, figures)
    for place, layer in enumerate(layers):
        install(layer, OffloadedLayer(place, layer.num_experts, cache, speculation))
    model: Any = source.model
    model.esft_offload = Offloaded(store, cache, speculation, _clock(model, figures))


def _clock(model: PreTrainedModel, figures: OffloadFigures) -> Iterable[Any]:
    """Time a model's forward passes, apart by whether they are over one position or several."""
    began = 0.0

    def start(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal began
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            figures.now = figures.written if ids.shape[1] == 1 else figures.read
            figures.now.tokens += ids.numel()
        began = time.perf_counter()

    def stop(*_: Any) -> None:
        figures.now.seconds += time.perf_counter() - began

    yield model.register_forward_pre_hook(start, with_kwargs=True)
    yield model.register_forward_hook(stop)


def _move(source: WeightSource, device: torch.device) -> None:
    """Bring to a device all that is there. Not run so far: no GPU was to be had."""
    state = source.model.state_dict()
    source.put({name: state[name].to(device) for name in source.names if not state[name].is_meta})
    source.move_buffers(device)


def _told(source: WeightSource, store: ExpertStore, parts: Split, memory: ExpertMemory) -> str:
    total = sum(layer.num_experts for layer in source.layers)
    kept = sum(parts.kept.values())
    where = {
        CheckpointStore: "in the checkpoint",
        FileStore: "in a temporary file",
        PinnedStore: "in page-locked memory",
    }[type(store)]
    size = numerals.size(stored_bytes(source, store))
    return (
        f"{total:,} experts of {len(source.layers)} layers: {size} {where}; "
        f"{numerals.size(memory.budget)} keep {min(kept, total):,} of them, "
        f"with {parts.staging} guessed and {parts.working} needed ones on their way"
    )

"""The experts at hand: a delta's, those that layers used last, those on their way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

import torch

from esft.moe import MoeLayer
from esft.offload.figures import OffloadFigures
from esft.offload.loader import Loader
from esft.offload.split import Split
from esft.offload.stores import ExpertStore
from esft.offload.weights import Weights, moved, plain_tensors, weight_bytes

Place = tuple[int, int]
"""Position of a layer among those with experts, and an expert's id."""


class ExpertCache:
    """A model's experts, as many at a time as a budget allows. For one thread at a time.

    What is evicted is what its layer has not used for longest. Guessed experts evict nothing: they
    wait beside the caches until their layer's turn, and go again if it does not need them.
    """

    def __init__(
        self,
        store: ExpertStore,
        layers: Sequence[MoeLayer],
        parts: Split,
        figures: OffloadFigures,
        *,
        pinned: Mapping[Place, Weights] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Begin with nothing but the pinned experts.

        Args:
            store: where the others are.
            layers: by position.
            parts: how many experts may be where.
            figures: are added to.
            pinned: experts that stay, in the place of the store's, on the device.
            device: where experts are wanted; None is the CPU.
        """
        self._store, self._layers, self._parts = store, layers, parts
        self._figures, self._pinned = figures, dict(pinned or {})
        self._device = device or torch.device("cpu")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._kept: list[OrderedDict[int, Weights]] = [OrderedDict() for _ in layers]
        self._staged: dict[Place, Future[Weights]] = {}
        self._unwanted: list[Future[Weights]] = []  # guesses that were wrong, but are being read
        self._pinned_bytes = sum(map(weight_bytes, self._pinned.values()))
        self._largest = max(weight_bytes(store.shape(layer)) for layer in layers)
        self._loader: Loader[Place, Weights] = Loader(self._load)

    def visit(
        self,
        layer: int,
        experts: Sequence[int],
        use: Callable[[int, Weights], None],
        meanwhile: Callable[[], None],
    ) -> None:
        """Call `use` with each expert that a layer needs, first with those that are there.

        Args:
            layer: its position.
            experts: different ids; where the cache cannot keep them all, it keeps the last.
            use: computes; must not hold on to what it is given.
            meanwhile: called once, as soon as everything that is needed has been asked for.

        Raises:
            ModelError: an expert cannot be read.
        """
        kept, passes = self._kept[layer], self._figures.now
        self._forget(layer, experts)
        pinned = [e for e in experts if (layer, e) in self._pinned]
        others = [e for e in experts if (layer, e) not in self._pinned]
        hits = [e for e in others if e in kept]
        staged = [e for e in others if e not in kept and (layer, e) in self._staged]
        missing = [e for e in others if e not in kept and (layer, e) not in self._staged]
        passes.needed += len(experts)
        passes.pinned += len(pinned)
        passes.hits += len(hits)
        passes.staged += len(staged)
        for expert in staged:
            self._loader.hurry((layer, expert), self._staged[layer, expert])
        asked: dict[int, Future[Weights]] = {}
        try:
            self._ask(layer, missing, asked)
            meanwhile()
            for expert in pinned:
                use(expert, self._pinned[layer, expert])
            for expert in hits:
                kept.move_to_end(expert)
                use(expert, kept[expert])
            for expert in staged:
                try:
                    self._use_fetched(layer, expert, self._staged[layer, expert], use)
                finally:
                    del self._staged[layer, expert]
            while missing or asked:
                self._ask(layer, missing, asked)
                expert = next(iter(asked))
                future = asked.pop(expert)
                future.result()
                # One is computed with while the next is on its way.
                self._ask(layer, missing, asked, busy=1)
                self._use_fetched(layer, expert, future, use)
                del future
        finally:
            self._drop(asked.values())

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Fetch experts that a layer to come will need, the likeliest first, as far as room is."""
        for expert in experts:
            if len(self._staged) + len(self._unwanted) >= self._parts.staging:
                return
            place = layer, expert
            if place not in self._staged and not self.holds(layer, expert):
                self._staged[place] = self._loader.fetch(place, urgent=False)
                self._count()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is pinned, or in its layer's cache."""
        return (layer, expert) in self._pinned or expert in self._kept[layer]

    def close(self) -> None:
        """End the thread and let go of all experts."""
        self._loader.close()
        self._staged.clear()
        self._unwanted.clear()
        self._pinned.clear()
        for kept in self._kept:
            kept.clear()

    def _ask(
        self,
        layer: int,
        missing: list[int],
        asked: dict[int, Future[Weights]],
        busy: int = 0,
    ) -> None:
        """Ask for missing experts, as many as may be on their way or be computed with: `busy`."""
        while missing and len(asked) + busy < self._parts.working:
            expert = missing.pop(0)
            asked[expert] = self._loader.fetch((layer, expert), urgent=True)
            self._count(len(asked) + busy)

    def _use_fetched(
        self,
        layer: int,
        expert: int,
        future: Future[Weights],
        use: Callable[[int, Weights], None],
    ) -> None:
        """Compute with an expert that was fetched, and keep it in the place of the oldest."""
        weights = future.result()
        if self._stream is not None:  # its memory must not be given to the next copy too early
            for _, _, tensor in plain_tensors(weights):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        use(expert, weights)
        kept = self._kept[layer]
        if most := self._parts.kept[self._layers[layer].index]:
            while len(kept) >= most:
                kept.popitem(last=False)
            kept[expert] = weights

    def _forget(self, layer: int, needed: Sequence[int]) -> None:
        """Drop what was guessed for this layer, or for one before it, and is not needed."""
        self._unwanted = [future for future in self._unwanted if not future.done()]
        wrong = [
            place
            for place in self._staged
            if place[0] < layer or (place[0] == layer and place[1] not in needed)
        ]
        self._drop([self._staged.pop(place) for place in wrong])

    def _drop(self, futures: Iterable[Future[Weights]]) -> None:
        for future in futures:
            if not future.cancel():
                self._figures.wasted += 1
                if not future.done():
                    self._unwanted.append(future)

    def _load(self, place: Place) -> Weights:
        """Bring an expert to the device; in the loader's thread, which alone counts it."""
        layer, expert = place
        weights = self._store.read(self._layers[layer], expert)
        self._figures.fetched += 1
        self._figures.bytes_moved += weight_bytes(weights)
        if self._stream is None:
            return weights
        with torch.cuda.stream(self._stream):
            there = moved(weights, self._device)
        self._stream.synchronize()
        return there

    def _count(self, working: int = 0) -> None:
        """Note how much memory experts take now."""
        experts = sum(map(len, self._kept)) + len(self._staged) + len(self._unwanted) + working
        taken = self._pinned_bytes + experts * self._largest
        self._figures.expert_bytes = max(self._figures.expert_bytes, taken)

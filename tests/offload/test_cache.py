"""What is at hand, against a plain simulation, and never more than the budget."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esft.errors import ModelError
from esft.offload.cache import ExpertCache
from esft.offload.figures import OffloadFigures
from esft.offload.split import Split

LAYERS, EXPERTS, NUMBERS = 3, 8, 5
LAYER: Any = [SimpleNamespace(index=number + 1) for number in range(LAYERS)]


class Store:
    """Experts that know who they are, and a count of those that somebody holds."""

    def __init__(self) -> None:
        self.live = self.most = 0
        self.read_keys: list[tuple[int, int]] = []
        self.broken: set[tuple[int, int]] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self._lock = threading.RLock()

    def shape(self, _layer: Any) -> dict[str, torch.Tensor]:
        return {"w": torch.empty(NUMBERS, device="meta")}

    def read(self, layer: Any, expert: int) -> dict[str, torch.Tensor]:
        self.begun.set()
        self.gate.wait()
        self.read_keys.append((layer.index, expert))
        if (layer.index, expert) in self.broken:
            raise ModelError(f"layer {layer.index}, expert {expert} is damaged")
        weight = torch.full((NUMBERS,), 100.0 * layer.index + expert)
        with self._lock:
            self.live += 1
            self.most = max(self.most, self.live)
        weakref.finalize(weight, self._gone)
        return {"w": weight}

    def close(self) -> None:
        pass

    def hold(self, ask: Callable[[], None]) -> None:
        """Ask for experts and wait until the first is being read; `gate` lets that go on."""
        self.gate.clear()
        self.begun.clear()
        ask()
        assert self.begun.wait(30)

    def _gone(self) -> None:
        with self._lock:
            self.live -= 1


def cache_of(store: Any, parts: Split, **options: Any) -> tuple[ExpertCache, OffloadFigures]:
    figures = OffloadFigures()
    return ExpertCache(store, LAYER, parts, figures, **options), figures


def split_of(kept: int, staging: int = 0, working: int = 2) -> Split:
    return Split({layer.index: kept for layer in LAYER}, staging, working)


def visit(cache: ExpertCache, layer: int, experts: list[int], meanwhile: Any = None) -> list[int]:
    """Visit, check what was given, and return the order."""
    order: list[int] = []

    def use(expert: int, weights: dict[str, Any]) -> None:
        assert weights["w"].tolist() == [100.0 * LAYER[layer].index + expert] * NUMBERS
        order.append(expert)

    cache.visit(layer, experts, use, meanwhile or (lambda: None))
    assert sorted(order) == sorted(experts)
    return order


@pytest.mark.parametrize("kept", [0, 1, 3, 8])
@pytest.mark.parametrize("working", [1, 2])
def test_the_least_recently_used_goes(kept: int, working: int) -> None:
    store = Store()
    cache, figures = cache_of(store, split_of(kept, working=working))
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in LAYER]
    draw, hits = random.Random(0), 0
    for _ in range(60):
        for layer in range(LAYERS):
            needed = draw.sample(range(EXPERTS), draw.randint(1, 5))
            order = visit(cache, layer, needed)
            own = held[layer]
            there = [e for e in needed if e in own]
            assert order[: len(there)] == there  # those at hand do not wait for the others
            hits += len(there)
            for expert in order:
                own.pop(expert, None)
                own[expert] = None
                if len(own) > kept:
                    own.popitem(last=False)
            assert all(cache.holds(layer, e) == (e in own) for e in range(EXPERTS))
    assert figures.read.hits == hits
    assert figures.fetched == figures.read.needed - hits == len(store.read_keys)
    assert figures.bytes_moved == figures.fetched * NUMBERS * 4
    assert store.most <= LAYERS * kept + working
    cache.close()
    assert store.live == 0


def test_never_more_than_the_budget_whatever_is_guessed() -> None:
    store = Store()
    parts = split_of(2, staging=3)
    cache, figures = cache_of(store, parts)
    draw = random.Random(1)
    for _ in range(80):
        for layer in range(LAYERS):
            following = draw.sample(range(EXPERTS), 4)

            def meanwhile(target: int = layer + 1, guesses: list[int] = following) -> None:
                if target < LAYERS:
                    cache.guess(target, guesses)

            visit(cache, layer, draw.sample(range(EXPERTS), draw.randint(1, 5)), meanwhile)
    assert figures.read.staged
    assert figures.wasted
    assert figures.fetched == len(store.read_keys)
    assert store.most <= LAYERS * 2 + 3 + 2
    assert figures.expert_bytes <= (LAYERS * 2 + 3 + 2) * NUMBERS * 4
    cache.close()


def test_a_right_guess_is_fetched_once_and_kept_and_a_wrong_one_goes() -> None:
    store = Store()
    cache, figures = cache_of(store, split_of(2, staging=4))
    visit(cache, 1, [0, 1])
    visit(cache, 0, [0], lambda: cache.guess(1, [1, 2, 3]))  # 1 is at hand
    assert cache.holds(1, 0)
    assert cache.holds(1, 1)
    visit(cache, 1, [2])
    assert Counter(store.read_keys)[2, 2] == 1
    assert (figures.read.staged, figures.read.hits) == (1, 0)
    assert cache.holds(1, 2)
    assert cache.holds(1, 1)
    assert not cache.holds(1, 0)
    cache.close()


def test_what_is_needed_is_read_before_what_is_guessed() -> None:
    store = Store()
    cache, figures = cache_of(store, split_of(2, staging=4))
    store.hold(lambda: cache.guess(1, [5, 6, 7]))
    visit(cache, 0, [1, 2], store.gate.set)
    assert store.read_keys[:3] == [(2, 5), (1, 1), (1, 2)]
    visit(cache, 1, [7])
    assert figures.read.staged == 1
    cache.close()


def test_a_guess_that_came_true_is_read_before_those_for_later_layers() -> None:
    store = Store()
    cache, _ = cache_of(store, split_of(2, staging=4))
    store.hold(lambda: cache.guess(2, [1, 2, 3]))
    cache.guess(1, [7])
    visit(cache, 1, [7], store.gate.set)
    assert store.read_keys[:2] == [(3, 1), (2, 7)]
    cache.close()


@pytest.mark.parametrize("working", [1, 2])
def test_one_is_computed_with_while_the_next_is_read(working: int) -> None:
    store = Store()
    cache, _ = cache_of(store, split_of(0, working=working))

    def use(_expert: int, _weights: Any) -> None:
        number = len(used) + 1
        end = time.monotonic() + 30
        while len(store.read_keys) < min(number + working - 1, 5) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)  # for more to be read, if that were not held back
        used.append(len(store.read_keys))

    used: list[int] = []
    cache.visit(0, [0, 1, 2, 3, 4], use, lambda: None)
    assert used == [min(number + working - 1, 5) for number in range(1, 6)]
    assert store.most <= working
    cache.close()


def test_guesses_that_were_not_begun_are_taken_back() -> None:
    store = Store()
    cache, figures = cache_of(store, split_of(2, staging=4))
    store.hold(lambda: cache.guess(1, [4, 5, 6, 7]))
    visit(cache, 1, [1], store.gate.set)
    assert store.read_keys == [(2, 4), (2, 1)]
    assert figures.wasted == 1
    cache.close()


def test_pinned_experts_are_never_read() -> None:
    store = Store()
    pinned: Any = {(1, 3): {"w": torch.full((NUMBERS,), 203.0)}}
    cache, figures = cache_of(store, split_of(1, staging=2), pinned=pinned)
    for _ in range(3):
        visit(cache, 0, [3], lambda: cache.guess(1, [3]))
        visit(cache, 1, [3, 4, 5])
    assert (2, 3) not in store.read_keys
    assert (1, 3) in store.read_keys
    assert figures.read.pinned == 3
    assert figures.read.needed == 12
    assert figures.expert_bytes >= NUMBERS * 4
    assert cache.holds(1, 3)
    cache.close()


@pytest.mark.parametrize("guessed", [False, True])
def test_a_damaged_expert_is_an_error_only_where_it_is_needed(guessed: bool) -> None:
    store = Store()
    store.broken.add((2, 4))
    cache, _ = cache_of(store, split_of(2, staging=2))
    visit(cache, 0, [1], lambda: cache.guess(1, [4]) if guessed else None)
    visit(cache, 1, [1])  # a guess that fails is of no matter
    if guessed:
        visit(cache, 0, [1], lambda: cache.guess(1, [4]))
    with pytest.raises(ModelError, match="layer 2, expert 4 is damaged"):
        visit(cache, 1, [2, 4, 5, 6])
    store.broken.clear()
    visit(cache, 1, [2, 4, 5, 6])
    cache.close()


def test_an_error_while_computing_leaves_the_cache_in_order() -> None:
    store = Store()
    cache, _ = cache_of(store, split_of(2, staging=2))

    def fail(_expert: int, _weights: Any) -> None:
        raise RuntimeError("in the model")

    with pytest.raises(RuntimeError, match="in the model"):
        cache.visit(0, [1, 2, 3], fail, lambda: None)
    visit(cache, 0, [1, 2, 3, 4])
    assert store.most <= LAYERS * 2 + 2 + 2
    cache.close()
    assert store.live == 0


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    cache, _ = cache_of(Store(), split_of(2, staging=4))
    cache.guess(1, [1, 2])
    cache.close()
    assert threading.active_count() == before

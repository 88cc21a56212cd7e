"""What later layers are guessed to need, against a computation of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esft.offload.expert_memory import ExpertMemory
from tests.models import EXPERTS, LAYERS, TOP_K, tiny
from tests.offload.models import EXPERT, IDS, answers, logits, offloaded, resident


class Watched:
    """What each router of a Qwen3-MoE was given, by layer, one entry a pass."""

    def __init__(self, model: Any) -> None:
        self.gates = [layer.mlp.gate for layer in model.model.layers]
        self.seen: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.calls = 0
        for place, gate in enumerate(self.gates):
            gate.register_forward_pre_hook(
                lambda _module, args, place=place: self.seen[place].append(args[0].clone())
            )

    def chosen(self, gate: int, x: torch.Tensor) -> set[int]:
        rows = x.reshape(-1, x.shape[-1]) @ self.gates[gate].weight.t()
        return set(rows.topk(TOP_K).indices.flatten().tolist())

    def recall(self, ahead: int, written: bool) -> tuple[int, int]:
        """Return how many needed experts were guessed, of how many, by brute force."""
        guessed = guessable = 0
        for one in range(len(self.seen[0])):
            if (self.seen[0][one].numel() == IDS.shape[0] * 32) != written:
                continue
            for layer in range(1, LAYERS):
                guesses: set[int] = set()
                for before in range(max(0, layer - ahead), layer):
                    guesses |= self.chosen(layer, self.seen[before][one])
                needed = self.chosen(layer, self.seen[layer][one])
                guessed += len(guesses & needed)
                guessable += len(needed)
        return guessed, guessable


@pytest.mark.parametrize("ahead", [1, 2])
def test_recall_is_what_the_routers_applied_too_early_give(tmp_path: Path, ahead: int) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    memory = ExpertMemory(EXPERT * 12, ahead=ahead)
    with offloaded(tmp_path, memory) as model:
        watched = Watched(model)
        answers(model, tokens=12)
    for passes, written in ((memory.figures.read, False), (memory.figures.written, True)):
        assert (passes.guessed, passes.guessable) == watched.recall(ahead, written)
        assert passes.recall == passes.guessed / passes.guessable
    assert 1 / 4 < memory.figures.written.recall < 1  # by chance 1/4 to 1/2 of them
    assert memory.figures.written.staged > 0


def test_looking_ahead_calls_no_hook_of_a_router(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    with offloaded(tmp_path, ExpertMemory(EXPERT * 12, ahead=2)) as model:
        watched = Watched(model)
        logits(model)
    assert [len(seen) for seen in watched.seen] == [1] * LAYERS


def test_nothing_is_guessed_unless_asked(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    memory = ExpertMemory(EXPERT * 12, ahead=0)
    with offloaded(tmp_path, memory) as model:
        answers(model)
    figures = memory.figures
    assert figures.written.recall is None
    assert figures.written.staged == figures.wasted == 0
    needed = figures.written.needed + figures.read.needed
    assert figures.fetched == needed - figures.written.hits - figures.read.hits


def test_the_figures_of_a_pass_are_those_of_the_routing(tmp_path: Path) -> None:
    tiny("olmoe").save_pretrained(tmp_path)
    model = resident(tmp_path)
    needed = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda _module, args: needed.append(len(args[1].unique()))
        )
    logits(model)
    memory = ExpertMemory("1GB")
    with offloaded(tmp_path, memory) as found:
        logits(found)
        first = memory.figures.to_dict()
        logits(found)
    assert first["read"]["needed"] == sum(needed)
    assert first["read"]["hits"] == 0
    assert first["read"]["tokens"] == IDS.numel()
    assert first["written"]["tokens"] == 0
    assert first["store_bytes"] == LAYERS * EXPERTS * EXPERT
    # All fit: after the first pass each is there, whoever fetched it.
    assert memory.figures.read.hits == sum(needed)
    assert memory.figures.bytes_moved <= LAYERS * EXPERTS * EXPERT
    assert memory.figures.bytes_moved == memory.figures.fetched * EXPERT


def test_a_guess_that_a_router_cannot_make_is_left_out(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    wanted = resident(tmp_path)
    memory = ExpertMemory(EXPERT * 12)
    with offloaded(tmp_path, memory) as model:
        gate = model.model.layers[2].mlp.gate
        own = gate.forward
        calls = []

        def picky(x: torch.Tensor) -> Any:
            calls.append(x)
            if len(calls) % 2:  # when it is looked ahead; the layer itself comes after
                raise TypeError("takes something else")
            return own(x)

        gate.forward = picky
        assert torch.equal(logits(model), logits(wanted))
    assert 0 < memory.figures.read.guessable <= EXPERTS

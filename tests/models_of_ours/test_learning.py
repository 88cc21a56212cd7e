"""Each model learns real text: a few hundred steps from nothing, against counts of byte pairs."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from esft.locating import TINY_MOE_FOLDER
from tests.models_of_ours.tiny_models import fresh

STEPS, ROWS, LENGTH = 200, 8, 64
BYTES = 256
SIZES: dict[str, Any] = {
    "vocab_size": BYTES,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "grok1": {
        "initializer_range": 0.05,
        "intermediate_size": 64,
        "embedding_multiplier": 8.0,
        "attn_logit_softcapping": 30.0,
    },
    "openmoe": {"initializer_range": 0.05, "intermediate_size": 64},
    "moeut": {"moe_intermediate_size": 64},
}


def text(held_out: bool) -> list[int]:
    """Bytes of the text that ships with tiny-moe: of every tenth row, or of the others."""
    found = []
    for path in sorted((TINY_MOE_FOLDER / "heldout").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found += [
            f"{row['prompt']}{row['completion']}\n"
            for number, row in enumerate(rows)
            if (number % 10 == 4) == held_out
        ]
    return list("".join(found).encode())


def baselines(train: list[int], test: list[int]) -> tuple[float, float]:
    """Return the loss, nats a byte, of counts of bytes and of pairs of them (each plus a bit)."""
    ones, pairs = Counter(train), Counter(pairwise(train))
    share = {byte: (ones[byte] + 1) / (len(train) + BYTES) for byte in range(BYTES)}
    one = -sum(math.log(share[byte]) for byte in test) / len(test)
    two = 0.0
    for before, byte in pairwise(test):
        # What is missing of a pair's count, the byte's own share fills.
        two -= math.log((pairs[before, byte] + share[byte]) / (ones[before] + 1))
    return one, two / (len(test) - 1)


def loss_on(model: Any, test: list[int]) -> float:
    blocks = torch.tensor(test[: len(test) // LENGTH * LENGTH]).view(-1, LENGTH)
    model.eval()
    with torch.no_grad():
        return model(blocks, labels=blocks, output_router_logits=False).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_it_learns(name: str) -> None:
    train, test = text(held_out=False), text(held_out=True)
    model = fresh(name, **SIZES | OWN[name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor(train)
    for _ in range(STEPS):
        starts = torch.randint(len(train) - LENGTH, (ROWS, 1), generator=generator)
        rows = data[starts + torch.arange(LENGTH)]
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    one, two = baselines(train, test)
    found = loss_on(model, test)
    print(f"{name}: {found:.3f}, pairs {two:.3f}, bytes {one:.3f}")
    assert two < one
    assert found < two - 0.3

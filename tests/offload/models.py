"""Models with all experts in memory, and the same with few: what the tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esft.loading import auto_class, load_config
from esft.offload.expert_memory import ExpertMemory
from esft.offload.opening import close_offloaded, open_offloaded
from tests.models import HIDDEN, INNER, TOP_K

IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
EXPERT = 3 * HIDDEN * INNER * 4  # bytes of an expert in fp32, gated and without biases
LEAST = TOP_K * EXPERT


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load by plain transformers, the parameters cloned out of the file."""
    kind = auto_class(load_config(folder))
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def offloaded(folder: Path, memory: ExpertMemory | int, **options: Any) -> Iterator[Any]:
    """Open a model with little memory for its experts, for what is done in the block."""
    model = open_offloaded(folder, ExpertMemory.of(memory), **options)
    try:
        yield model
    finally:
        close_offloaded(model)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def answers(model: Any, ids: torch.Tensor = IDS, tokens: int = 6) -> torch.Tensor:
    """Return the tokens that greedy decoding adds, `[B, tokens]`."""
    with torch.no_grad():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return found[:, ids.shape[1] :]

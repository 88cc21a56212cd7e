"""The random number generators of every library that a run draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from transformers import set_seed


def random_state() -> dict[str, Any]:
    """Return where the generators are: of Python, NumPy, torch, and of every GPU in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        # Asking for it would start CUDA where nobody has drawn from it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where they were.

    Those of GPUs that this machine lacks are left out; the same bits are promised only on the
    same machine.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def draw_apart(seed: int, rank: int) -> None:
    """Let one of several processes draw other numbers than the first one, which draws on."""
    if rank:
        # Far apart: seeds that users try differ by little.
        set_seed((seed + rank * 1_000_003) % 2**32)

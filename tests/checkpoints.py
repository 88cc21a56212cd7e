"""Tiny random checkpoints on disk for tests, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import tiny
from tests.toy_tokenizers import byte_tokenizer

VOCAB = 300  # 256 bytes, three special tokens and room


def save_tiny(folder: Path, family: str = "qwen3_moe", seed: int = 0, **tokenizer: Any) -> Path:
    """Save a tiny random model and a byte tokenizer into `folder`, and return the folder.

    Args:
        folder: where to.
        family: one of `tests.models.FAMILIES`.
        seed: of the weights.
        tokenizer: arguments of `byte_tokenizer`.
    """
    made = byte_tokenizer(**tokenizer)
    model = tiny(
        family,
        seed,
        vocab_size=VOCAB,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder

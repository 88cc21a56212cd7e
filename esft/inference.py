"""A model made ready for use: base weights, a delta over them if there is one, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from esft.delta import attach_delta
from esft.errors import ModelError
from esft.loading import load_model, load_tokenizer
from esft.locating import resolve


def load(
    model: str | Path,
    *,
    delta: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer for inference.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        delta: folder of a delta made from this model; its weights replace the model's.
        device: see `esft.loading.pick_device`.
        dtype: see `esft.loading.pick_dtype`.

    Raises:
        ModelError: the checkpoint cannot be loaded, or its tokenizer has more tokens than it.
        DeltaError: the delta is damaged.
        CheckError: the delta was made from another base.
    """
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, device=device, dtype=dtype)
    check_vocabulary(tokenizer, loaded, folder)
    if delta is not None:
        loaded = attach_delta(loaded, folder, Path(delta))
    return loaded, tokenizer


def check_vocabulary(tokenizer: Any, model: PreTrainedModel, folder: Path) -> None:
    """Check that a model embeds every token of its tokenizer.

    Raises:
        ModelError: it does not; `folder` is named.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens and the model embeds {rows:,}; "
            f"they do not belong together"
        )

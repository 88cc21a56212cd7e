"""A model made ready for use: base weights, a delta over them if there is one, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from esft.delta import attach_delta
from esft.errors import ModelError
from esft.loading import load_model, load_tokenizer
from esft.locating import resolve
from esft.offload.expert_memory import ExpertMemory
from esft.offload.opening import close_offloaded, open_offloaded
from esft.progress import SILENT, Reporter


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


@contextmanager
def opened(
    model: str | Path,
    *,
    delta: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    expert_memory: str | int | ExpertMemory | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[tuple[PreTrainedModel, Any]]:
    """Load a model and its tokenizer for what is done in the block; arguments as for `load`.

    Args:
        model: see `load`.
        delta: see `load`.
        device: see `load`.
        dtype: see `load`.
        expert_memory: bytes for the routed experts, `2GB`, or more said of them: then they are
            fetched when they are needed, see `esft.offload.opening`. None loads all.
        reporter: told where the experts are.

    Raises:
        EsftError: the memory is too little, or no number; else as `load`.
    """
    if expert_memory is None:
        yield load(model, delta=delta, device=device, dtype=dtype)
        return
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    loaded = open_offloaded(
        folder,
        ExpertMemory.of(expert_memory),
        delta=None if delta is None else Path(delta),
        device=device,
        dtype=dtype,
        reporter=reporter,
    )
    try:
        check_vocabulary(tokenizer, loaded, folder)
        yield loaded, tokenizer
    finally:
        close_offloaded(loaded)


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

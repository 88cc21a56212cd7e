"""A LoRA adapter in PEFT's files, added to a loaded model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from esft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a PEFT adapter and add it to the model's weights, in place.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    from peft import PeftModel  # slow to import, and most deltas are no adapters

    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: this adapter does not fit: {error}") from error
    return merged

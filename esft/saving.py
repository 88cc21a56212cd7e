"""A delta from a training loop of one's own, in one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.changes import check_changes, trained_changes
from esft.delta import write_delta
from esft.experts import attached_parts, attached_selection
from esft.files import new_folder, refuse_existing
from esft.fingerprint import fingerprint, tokenizer_digest
from esft.loading import refuse_quantised
from esft.locating import resolve
from esft.moe import text_config
from esft.processes import is_main, together
from esft.shards import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_delta(model: PreTrainedModel, out: str | Path, base: str | Path) -> None:
    """Save what trained in a model that has a selection attached.

    Where there are several processes, all must call this; the main one writes, once.

    Args:
        model: whole, or shared by the processes (`DistributedConfig(tp_size=, ep_size=)`).
        out: the delta's folder; must not exist, or be empty.
        base: what the model was loaded from: a folder, a hub id, or `tiny-moe`.

    Raises:
        ModelError: no selection is attached, or the base cannot be found or is quantised.
        DeltaError: what trained has no place in the base, or is not finite.
        OutputError: `out` exists, or the disk is full.
        ElsewhereError, LostProcessError: see `esft.processes.together`.
    """
    with together("save the delta"):
        refuse_existing(Path(out))
        folder = resolve(base)
        refuse_quantised(folder)
        tensors = fingerprint(open_checkpoint(folder))
        changes = trained_changes(model, tensors)
        if not is_main():
            return
        check_changes(changes, tensors)
        selection = attached_selection(model)
        about: dict[str, Any] = {
            "method": "esft",
            "base": {
                "name": str(base),
                "model_type": text_config(model).model_type,
                "architecture": type(model).__name__,
                "tokenizer": tokenizer_digest(folder),
            },
            "training": {"beside_the_selection": list(attached_parts(model).names)},
        }
        if selection is not None:
            about["selection"] = selection.to_dict()
        with new_folder(Path(out)) as temporary:
            write_delta(temporary, tensors, changes, about)

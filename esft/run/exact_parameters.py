"""What trains, exactly as it is in memory, beside a checkpoint of transformers' own Trainer.

Such a checkpoint holds the whole model, trained experts rounded to its dtype; and resuming from it
leaves the experts of an attached selection at their initial weights (transformers issue 48805).
A folder `esft` in it holds what is missing: `trained.safetensors`, the trainable parameters by
name, and `trained.json` with the file's sha256 and a token that tells this save from any other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from esft.errors import CheckError
from esft.files import explain_write_errors, new_folder, read_json, sha256_file, write_json
from esft.moe import trainable_parameters

FORMAT = "esft-trained/1"
FOLDER = "esft"
TENSORS, ABOUT = "trained.safetensors", "trained.json"


def save_exactly(checkpoint: Path, model: nn.Module, token: str) -> None:
    """Write what trains into a checkpoint, atomically; what an earlier save left is replaced.

    Args:
        checkpoint: an existing folder.
        model: its trainable parameters are saved, in their own dtype.
        token: recognises this save.

    Raises:
        OutputError: the disk is full or read-only.
    """
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in trainable_parameters(model).items()
    }
    with new_folder(checkpoint / FOLDER, replace=True) as folder:
        with explain_write_errors(checkpoint / FOLDER, sum(t.nbytes for t in tensors.values())):
            save_file(tensors, folder / TENSORS)
        digest = sha256_file(folder / TENSORS)
        write_json(folder / ABOUT, {"format": FORMAT, "token": token, "sha256": digest})


def token_of(checkpoint: Path) -> str | None:
    """Return the token that a checkpoint was saved with, or None where nothing is saved in it."""
    path = checkpoint / FOLDER / ABOUT
    return str(_about(path).get("token")) if path.is_file() else None


def restore_exactly(checkpoint: Path, model: nn.Module) -> None:
    """Copy what was saved into a model that was attached in the same way, in place.

    Raises:
        CheckError: nothing is saved there, it is damaged, or it is of another selection.
    """
    path = checkpoint / FOLDER / TENSORS
    if not path.is_file():
        raise CheckError(f"{checkpoint}: no {FOLDER}/{TENSORS} in this checkpoint")
    if sha256_file(path) != _about(checkpoint / FOLDER / ABOUT).get("sha256"):
        raise CheckError(f"{path}: damaged: not the sha256 in {ABOUT}")
    parameters = trainable_parameters(model)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if saved != expected:
            other = min(name for name, _ in saved.items() ^ expected.items())
            raise CheckError(
                f"{path}: holds other experts than those attached now: {other} is "
                f"{saved.get(other, 'missing')} there, {expected.get(other, 'missing')} now"
            )
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))


def _about(path: Path) -> dict[str, object]:
    about = read_json(path, "checkpoint", CheckError)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckError(f"{path}: not of format {FORMAT}")
    return about

"""From a MODEL argument (folder, hub id or `tiny-moe`) to a folder, a model and a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from esft.errors import ModelError

TINY_MOE = "tiny-moe"
TINY_MOE_FOLDER = Path(__file__).parent / "tiny_moe"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a checkpoint needs to be loaded; pickled weights are never fetched.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*", "LICENSE*"]


def resolve(model: str | Path) -> Path:
    """Return the folder of a checkpoint, downloading it if `model` is a hub id.

    Args:
        model: a folder with a `config.json`, a hub id (`Qwen/Qwen3-30B-A3B`), or `tiny-moe`.

    Raises:
        ModelError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    if str(model) == TINY_MOE:
        return TINY_MOE_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; not a checkpoint")
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        raise ModelError(f"{model}: no such folder; give a checkpoint's folder or a hub id")
    return _download(str(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: no such folder, and the hub cannot be reached and has no cached copy here"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{hub_id}: {str(error).strip().splitlines()[0]}") from error


def pick_device(device: str | None = None) -> torch.device:
    """Return the asked-for device, or a GPU if there is one.

    Raises:
        ModelError: the name is no device, or this machine does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {device}: not usable here: {reason}") from error
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype to load weights in.

    `checkpoint` means the checkpoint's own dtype; `auto` means that on a GPU, and float32 on a
    CPU, where half precision is slow on most machines.

    Raises:
        ModelError: `dtype` is not one of these, `float32`, `bfloat16` or `float16`.
    """
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "checkpoint"
    if dtype == "checkpoint":
        return "auto"
    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype}: choose one of auto, checkpoint, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(
    model: str | Path, *, device: str | None = None, dtype: str = "auto"
) -> PreTrainedModel:
    """Load a causal language model for inference: evaluation mode, no gradients wanted.

    Args:
        model: see `resolve`.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: see `pick_dtype`.

    Raises:
        ModelError: the checkpoint is missing, damaged, pickled, or needs code of its own.
    """
    folder = resolve(model)
    place = pick_device(device)
    config = load_config(folder)
    return _guarded(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=pick_dtype(dtype, place),
            device_map=None if place.type == "cpu" else {"": place},
            use_safetensors=True,
        ).eval(),
    )


def load_skeleton(model: str | Path) -> PreTrainedModel:
    """Build a model on the meta device: its modules and shapes, without its weights.

    Raises:
        ModelError: as `load_model`.
    """
    folder = resolve(model)
    config = load_config(folder)
    with torch.device("meta"):
        return _guarded(folder, lambda: AutoModelForCausalLM.from_config(config))


def load_config(folder: Path) -> Any:
    """Read a checkpoint's configuration.

    Raises:
        ModelError: it is damaged, of an unknown family, or wants to run code of its own.
    """
    return _guarded(folder, lambda: AutoConfig.from_pretrained(folder))


def load_tokenizer(model: str | Path) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ModelError: the folder holds none, or it cannot be read.
    """
    folder = resolve(model)
    return _guarded(folder, lambda: AutoTokenizer.from_pretrained(folder))


def _guarded(folder: Path, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(f"{folder}: cannot load this checkpoint: {reason}") from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        if type(error).__module__.startswith("safetensors"):
            raise ModelError(f"{folder}: a weights file is damaged: {error}") from error
        raise

"""From a MODEL argument (folder, hub id or `tiny-moe`) to a folder, a model and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

import esft.models  # noqa: F401  makes them known to the auto classes
from esft.errors import ModelError
from esft.locating import first_line, resolve, trusted
from esft.processes import count, local_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "merges.txt", "tekken.json", "*.tiktoken")


def pick_device(device: str | None = None) -> torch.device:
    """Return the asked-for device, or a GPU if there is one: each process of a machine its own.

    Raises:
        ModelError: the name is no device, or this machine does not have it.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if count() == 1:
            return torch.device("cuda")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: not usable here: {first_line(error)}") from error
    if chosen.type == "meta":
        raise ModelError("--device meta: holds no weights; choose cpu or cuda")
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
    """Load a language model for inference: evaluation mode, no gradients wanted.

    Where a family has no causal language model by itself, the one that reads images too is loaded;
    text alone is given to it.

    Args:
        model: see `resolve`.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: see `pick_dtype`.

    Raises:
        ModelError: the checkpoint is missing, damaged, incomplete, pickled, or needs code of its
            own.
    """
    folder = resolve(model)
    place = pick_device(device)
    chosen = pick_dtype(dtype, place)
    config = check_loadable(folder)
    loaded, info = guarded(
        folder,
        lambda: auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=chosen,
            device_map=None if place.type == "cpu" else {"": place},
            use_safetensors=True,
            trust_remote_code=trusted.get(),
            output_loading_info=True,
        ),
    )
    # transformers fills these with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{folder}: the checkpoint lacks {len(missing):,} of the model's tensors, among them "
            f"{missing[0]}; it is incomplete or of another architecture"
        )
    return loaded.eval()


def check_loadable(folder: Path) -> Any:
    """Return a checkpoint's configuration, if it is one that esft's commands can run.

    Raises:
        ModelError: it is an encoder-decoder, has an adapter mixed in, or cannot be read.
    """
    config = load_config(folder)
    if config.is_encoder_decoder:
        raise ModelError(
            f"{folder}: {config.model_type} is an encoder-decoder; esft's commands profile, train "
            f"and score models that read a text and go on with it. inspect, merge and verify work, "
            f"and so do esft.attach and esft.pairs.profile_pairs on a model in memory"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds a PEFT adapter (adapter_config.json), which transformers would mix "
            f"in; merge it into its base first"
        )
    return config


def load_skeleton(model: str | Path) -> PreTrainedModel:
    """Build a model on the meta device: its modules and shapes, without its weights.

    Raises:
        ModelError: as `load_model`.
    """
    folder = resolve(model)
    config = load_config(folder)
    with torch.device("meta"):
        return guarded(
            folder, lambda: auto_class(config).from_config(config, trust_remote_code=trusted.get())
        )


def auto_class(config: Any) -> Any:
    """Return the auto class that a checkpoint is loaded by."""
    causal = AutoModelForCausalLM._model_mapping.get(type(config), None)
    prefix = getattr(causal, "base_model_prefix", None)
    if prefix == "language_model" and config is not config.get_text_config():
        # Such a class (Llama 4's) takes its weights from under that name in the files of the
        # whole model, and does not remember it; the names of what it trained would be wrong.
        return AutoModelForImageTextToText
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
        own_code = trusted.get() and kind.__name__ in (getattr(config, "auto_map", None) or {})
        if own_code or type(config) in kind._model_mapping:
            return kind
    return AutoModelForCausalLM  # it says best what is wrong


def load_config(folder: Path) -> Any:
    """Read a checkpoint's configuration.

    Raises:
        ModelError: it is damaged, of an unknown family, or wants to run code of its own.
    """
    return guarded(
        folder, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trusted.get())
    )


def refuse_quantised(folder: Path) -> None:
    """Refuse to train a checkpoint whose weights are quantised on disk.

    Raises:
        ModelError: it is; names the method (fp8, mxfp4, ...).
    """
    stored = getattr(load_config(folder), "quantization_config", None)
    if stored:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"{folder}: the weights are stored as {method or 'quantised'}; a delta for them cannot "
            f"be written yet: save a dequantised copy of the checkpoint and train that"
        )


def load_tokenizer(model: str | Path) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ModelError: the folder holds none, or it cannot be read.
    """
    folder = resolve(model)
    # Without a vocabulary transformers makes an empty tokenizer from the configuration.
    if not any(next(folder.glob(name), None) for name in _VOCABULARIES):
        raise ModelError(f"{folder}: no tokenizer in this folder (such as a tokenizer.json)")
    return guarded(
        folder,
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted.get()),
        "tokenizer",
    )


def guarded(folder: Path, load: Callable[[], Any], what: str = "checkpoint") -> Any:
    """Call a loader of transformers; what it raises for a damaged folder becomes a ModelError."""
    try:
        return load()
    except Exception as error:  # libraries raise all kinds for a damaged file
        if type(error).__module__.startswith("safetensors"):
            damaged = next(filter(_is_damaged, sorted(folder.glob("*.safetensors"))), folder)
            raise ModelError(f"{damaged}: this weights file is damaged: {error}") from error
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code of its own (auto_map), and esft runs none but transformers'; read "
                "that code, and if you trust it, give --trust-remote-code"
            )
        elif "above report" in reason:
            reason = (
                "its tensors are not those that its config.json asks for (some are missing, or of "
                "another shape); TRANSFORMERS_VERBOSITY=warning lists them"
            )
        raise ModelError(f"{folder}: cannot load this {what}: {reason}") from error


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except (SafetensorError, OSError):
        return True

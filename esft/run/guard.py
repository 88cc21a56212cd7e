"""What must be the same when a run is resumed."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from esft.data.packing import TrainSet
from esft.errors import EsftError
from esft.fingerprint import Fingerprint
from esft.manifest import versions
from esft.recipe_sections import Recipe
from esft.run.checkpoint import SavedState
from esft.run.task_data import data_identity, general_identity

if TYPE_CHECKING:
    from esft.selection import Selection

# Where files lie may change, what is in them may not; nor does what is kept change any bit.
_ELSEWHERE = ("device", "model", "data", "checkpoints")
_LINES = 20  # of a difference; a base has thousands of tensors
_LIBRARIES = ("esft", "torch", "transformers")


def guard(
    recipe: Recipe, base: Fingerprint, selection: Selection | None, tokens: str
) -> dict[str, Any]:
    """Describe a run by what decides its result, as nested JSON-ready mappings.

    Args:
        recipe: with every default filled in.
        base: of the checkpoint that training starts from.
        selection: the experts that train, if any are selected.
        tokens: `tokens_digest` of what it trains on.
    """
    return {
        **recipe_identity(recipe),
        "base": base,
        "data": data_identity(recipe.data) | {"tokens": tokens},
        "general": general_identity(recipe.evaluation),
        "selection": None if selection is None else _selected(selection),
    }


def _selected(selection: Selection) -> dict[str, Any]:
    written = selection.to_dict()
    flags = ("shared_experts", "non_expert_modules")
    return {**written["experts"], **{flag: written[flag] for flag in flags}}


def tokens_digest(train_set: TrainSet) -> str:
    """Return the hex sha256 of what a run trains on, item by item.

    It changes with the rows, and with all that makes tokens of them: tokenizer, chat template,
    the recipe's options, this program.
    """
    found = hashlib.sha256()
    for item in (train_set[index] for index in range(len(train_set))):
        for key in sorted(item):
            values = array("d" if key == "loss_weights" else "q", item[key])
            found.update(f"{key} {len(values)} ".encode() + values.tobytes())
    return found.hexdigest()


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe, with every default filled in, less where files lie."""
    elsewhere: dict[str, Any] = dict.fromkeys(_ELSEWHERE, True)
    if isinstance(recipe.selection, str):
        elsewhere["selection"] = True
    found = recipe.model_dump(exclude=elsewhere | {"evaluation": {"general"}})
    if found["frozen_dtype"] is None:
        del found["frozen_dtype"]  # as in checkpoints from before there was this key
    return {"recipe": found}


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where a run is: what may change its last bits though it is the same run."""
    found = versions()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": 1,
        **{name: found[name] for name in _LIBRARIES},
    }


def check_same(
    saved: SavedState, guard: Mapping[str, Any], environment: Mapping[str, Any], recipe: Recipe
) -> list[str]:
    """Refuse to resume another run than the one that was saved.

    Args:
        saved: the checkpoint.
        guard: of the run that is to go on, see `guard`.
        environment: where it is to go on, see `environment`.
        recipe: names the files in the message.

    Returns:
        What is different here and may change the last bits, to be noted: other libraries, another
        device.

    Raises:
        EsftError: the recipe, the data, the selection or the base is another one than then; names
            each difference. Or a run on a CPU is given other threads.
    """
    manifest = saved.manifest
    found = differences(manifest["guard"], guard, _files(recipe))
    if found:
        raise EsftError(f"{saved.folder}: cannot resume, the run has changed:\n" + "\n".join(found))
    then = manifest["environment"]
    on_cpu = then["device"] == environment["device"] == "cpu"
    if on_cpu and then["threads"] != environment["threads"]:
        raise EsftError(
            f"{saved.folder}: cannot resume to the same bits: {then['threads']} threads then, "
            f"{environment['threads']} now; set OMP_NUM_THREADS={then['threads']}"
        )
    return [
        f"{name}: {then.get(name)} when the run was saved, {environment[name]} now; the last bits "
        f"may differ from an uninterrupted run's"
        for name in ("device", *_LIBRARIES)
        if then.get(name) != environment[name]
    ]


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], files: Mapping[str, str] | None = None
) -> list[str]:
    """Compare nested mappings key by key; return a line a difference, hashes shortened.

    Args:
        then: one of them.
        now: the other.
        files: by the first parts of a key, the file that it comes from.
    """
    old, new = _flat(then), _flat(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "unset"), new.get(key, "unset")
        if before != after:
            named = (file for start, file in (files or {}).items() if f"{key}.".startswith(start))
            place = next((f" ({file})" for file in named), "")
            lines.append(f"  {key}: {_short(before)} then, {_short(after)} now{place}")
    if len(lines) > _LINES:
        return [*lines[:_LINES], f"  and {len(lines) - _LINES} more"]
    return lines


def _files(recipe: Recipe) -> dict[str, str]:
    files = {"base.": recipe.model}
    if isinstance(recipe.selection, str):
        files["selection."] = recipe.selection
    for key in ("train", "eval", "test"):
        if isinstance(place := getattr(recipe.data, key), str):
            files[f"data.{key}."] = place
    return files


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value):
        return f"{value[:12]}…"
    return value

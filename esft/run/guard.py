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
from esft.run.processes import step_shape
from esft.run.task_data import data_identity, general_identity

if TYPE_CHECKING:
    from transformers import TrainingArguments

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


def environment(arguments: TrainingArguments) -> dict[str, Any]:
    """Describe where a run is: what may change its last bits though it is the same run."""
    found, device = versions(), arguments.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **step_shape(arguments),
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
    then = saved.manifest["environment"]
    before, now = saved.manifest["guard"], guard
    notes = []
    if then["processes"] != environment["processes"]:
        _check_steps(saved, then, environment, drop_last=_drops_last(recipe))
        before, now = _without_split(before), _without_split(now)
        notes.append(
            f"processes: {then['processes']} when the run was saved, {environment['processes']} "
            f"now; each step has the same rows, but random draws (NEFTune, dropout) are others, "
            f"and the last bits may differ"
        )
    found = differences(before, now, _files(recipe))
    if found:
        raise EsftError(f"{saved.folder}: cannot resume, the run has changed:\n" + "\n".join(found))
    on_cpu = then["device"] == environment["device"] == "cpu"
    if on_cpu and then["threads"] != environment["threads"]:
        raise EsftError(
            f"{saved.folder}: cannot resume to the same bits: {then['threads']} threads then, "
            f"{environment['threads']} now; set OMP_NUM_THREADS={then['threads']}"
        )
    return notes + [
        f"{name}: {then.get(name)} when the run was saved, {environment[name]} now; the last bits "
        f"may differ from an uninterrupted run's"
        for name in ("device", *_LIBRARIES)
        if then.get(name) != environment[name]
    ]


# What splits a step's rows among processes and batches.
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _check_steps(
    saved: SavedState, then: Mapping[str, Any], now: Mapping[str, Any], *, drop_last: bool
) -> None:
    """Refuse other rows in a step, where the number of processes is another one.

    Raises:
        EsftError: says how a step of now would have those of then.
    """
    rows_then, rows_now = (
        shape["processes"] * shape["batch"] * shape["accumulated"] for shape in (then, now)
    )
    if rows_then != rows_now:
        processes, batch = now["processes"], now["batch"]
        if rows_then % (processes * batch) == 0:
            how = f"set training.gradient_accumulation_steps={rows_then // (processes * batch)}"
        elif rows_then % processes == 0:
            how = (
                f"set training.per_device_train_batch_size={rows_then // processes} and "
                f"training.gradient_accumulation_steps=1"
            )
        else:
            how = f"{processes} processes cannot share them evenly"
        raise EsftError(
            f"{saved.folder}: cannot resume with {processes} processes: a step had {rows_then} "
            f"rows ({then['processes']} x {then['batch']} x {then['accumulated']} accumulated), "
            f"and would have {rows_now} ({processes} x {batch} x {now['accumulated']}); {how}"
        )
    if drop_last and then["accumulated"] != now["accumulated"]:
        raise EsftError(
            f"{saved.folder}: cannot resume with {now['processes']} processes: with "
            f"training.dataloader_drop_last the rows that an epoch leaves out would be others; "
            f"set training.gradient_accumulation_steps={then['accumulated']}, and "
            f"training.per_device_train_batch_size so that a step has {rows_then} rows"
        )


def _drops_last(recipe: Recipe) -> bool:
    return bool(recipe.training.get("dataloader_drop_last"))


def _without_split(guard: Mapping[str, Any]) -> dict[str, Any]:
    recipe = guard["recipe"]
    training = {key: value for key, value in recipe["training"].items() if key not in _SPLIT}
    return {**guard, "recipe": {**recipe, "training": training}}


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

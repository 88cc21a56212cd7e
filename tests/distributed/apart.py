"""Rows and selections of which one process of two sees experts that the other does not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.loading import load_model, load_tokenizer
from esft.profiling import profile_model
from esft.scores import Scores
from esft.selection import Selection
from tests.checkpoints import save_tiny

# Of one, all experts are computed at once; of the other one after the other, if a token chose it.
FAMILIES = ("qwen3_moe", "dbrx")
KINDS = ("disjoint", "none")


def make(folder: Path, family: str) -> None:
    """Write a base, rows of two kinds that take turns, and selections of each kind.

    `disjoint`: in one layer an expert that only rows of the first kind choose, in another one
    that only the others do. `none`: in several layers experts that only the first ones choose.
    """
    save_tiny(folder / "tiny", family)
    model, tokenizer = load_model(folder / "tiny"), load_tokenizer(folder / "tiny")
    rows = [{"prompt": text, "completion": text.upper()} for text in "abcdefghijklmnop"]
    _write(folder / "all.jsonl", rows)
    examples = encode_rows(read_rows(folder / "all.jsonl"), tokenizer)
    # What a prompt's last token is sent to decides the loss; what the last token is sent to, not.
    seen, decisive = (
        [_chosen(profile_model(model, [example], count=count)) for example in examples]
        for count in ("all", "prompt")
    )
    for first, other in itertools.permutations(range(len(rows)), 2):
        ours, theirs = _only(decisive[first], seen[other]), _only(decisive[other], seen[first])
        turns = [(a, b) for a in ours for b in theirs if a != b]
        if turns and len(ours) > 1:
            break
    else:
        raise AssertionError("no two rows choose differently in two layers")
    _write(folder / "rows.jsonl", 4 * [rows[first], rows[other]])
    mine, yours = turns[0]
    Selection({mine: ours[mine], yours: theirs[yours]}).write(folder / "disjoint.json")
    Selection(ours).write(folder / "none.json")


def _chosen(scores: Scores) -> dict[int, set[int]]:
    return {
        layer: {expert for expert, score in enumerate(found.token) if score}
        for layer, found in scores.layers.items()
    }


def _only(chosen: dict[int, set[int]], others: dict[int, set[int]]) -> dict[int, list[int]]:
    """Return, of each layer that has one, an expert that is among the first ones only."""
    found = {layer: sorted(ids - others[layer])[:1] for layer, ids in chosen.items()}
    return {layer: ids for layer, ids in found.items() if ids}


def recipe(folder: Path, kind: str, batch: int) -> dict[str, Any]:
    """A run in whose steps the first process of two has rows of one kind, the second the others."""
    return {
        "model": str(folder / "tiny"),
        "selection": str(folder / f"{kind}.json"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 16, "packing": False},
        "routing_drift": False,
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": batch,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1e-3,
            "logging_steps": 1,
        },
    }


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

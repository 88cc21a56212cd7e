"""Prints the table of docs/scaling.md, by `esft plan` from configurations alone, or writes it.

Usage, from the repository's root: python -m tools.scaling_table [--write]

The configurations are the hub's for Qwen3-30B-A3B and GLM-4.5-Air (tests/golden/configs), and what
transformers' DeepseekV3Config has by itself for DeepSeek-V3. Neither weights nor rows are needed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, DeepseekV3Config

from esft.plans.planner import Planner
from esft.plans.records import Case
from esft.plans.scaling import scaled
from esft.recipe import make_recipe
from esft.report.numerals import count
from esft.run.fields import with_defaults
from tests.shrunken import config_of

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m tools.scaling_table --write -->\n", "<!-- end of the table -->\n"
# Each with the size of its name.
MODELS: dict[str, Callable[[], Any]] = {
    "Qwen3-30B-A3B": lambda: AutoConfig.for_model(**config_of("Qwen/Qwen3-30B-A3B")),
    "GLM-4.5-Air (106B)": lambda: AutoConfig.for_model(**config_of("zai-org/GLM-4.5-Air")),
    "DeepSeek-V3 (671B)": lambda: DeepseekV3Config(dtype="bfloat16"),
}
DEVICES = 8
RECIPE: dict[str, Any] = {
    "method": "esft",
    "selection": {"metric": "token", "p": 0.2},
    "routing_drift": False,
    "data": {"train": "train.jsonl", "max_length": 4096},
    "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
}


def column(name: str) -> dict[str, str]:
    """Return a model's figures by the words that head their rows."""
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name]().save_pretrained(folder)
        recipe = with_defaults(make_recipe(RECIPE | {"model": folder}))
        planner = Planner(recipe, None, "cuda")
        return dict(_rows(planner))


def _rows(planner: Planner) -> Iterator[tuple[str, str]]:
    model = planner.inference
    few, many = planner.cases()
    yield "parameters", count(sum(planner.parameters.values()))
    yield "checkpoint in bf16, on disk", _gb(planner.stored.bytes)
    yield "profile, model in memory", _gb(model.profiling)
    yield "profile `--stream`", _gb(model.streaming)
    yield "of this, hidden states (or in a file)", _gb(model.hidden)
    yield "experts trained, a layer", _between(few.most, many.most)
    yield "train, one device", _training(few, many)
    small = planner.changed(planner.recipe.model_copy(update={"frozen_dtype": "nf4"}))
    yield "train, one device, `frozen_dtype: nf4`", _training(*small.cases())
    shared = [scaled(planner.whole(case), DEVICES) for case in (few, many)]
    parallel = [
        (case.memory.without_profiling or 0) + case.memory.gradients for case in (few, many)
    ]
    yield f"train, data parallel, each of {DEVICES}", _between(*map(_gb, parallel))
    yield (
        f"train, FSDP2, each of {DEVICES}, once sharded",
        _between(*(_gb(each.sharded) for each in shared)),
    )
    yield "before that, each", _between(*(_gb(case.memory.loading) for case in (few, many)))
    yield (
        f"train, expert parallel, each of {DEVICES}",
        _between(*(_gb(each.by_expert) for each in shared)),
    )
    yield "delta", _between(*(_gb(case.disk.delta) for case in (few, many)))
    yield "generate, model in memory", _gb(model.generation)
    for words, experts, all_ in (
        ("the least", model.least, model.generation_least),
        ("recommended", model.recommended, model.generation_recommended),
    ):
        yield f"generate, {words} `--expert-memory`", f"{_gb(all_)} ({_gb(experts)})"


def table() -> str:
    """Return the table in Markdown."""
    columns = {name: column(name) for name in MODELS}
    lines = [["GB of a GPU's memory", *columns], ["---", *["---:"] * len(columns)]]
    first = next(iter(columns.values()))
    lines += [[words, *(found[words] for found in columns.values())] for words in first]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def shown() -> str:
    """Return the table that the page has."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def _training(few: Case, many: Case) -> str:
    return _between(*(_gb(case.memory.without_profiling) for case in (few, many)))


def _between(low: object, high: object) -> str:
    return f"{low} to {high}" if low != high else f"{low}"


def _gb(size: int | None) -> str:
    """Two digits of a size in GB: a plan promises no more than a tenth."""
    return "?" if size is None else f"{float(f'{size / 1e9:.2g}'):,g}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(shown(), table()), encoding="utf-8")
    else:
        print(table(), end="")

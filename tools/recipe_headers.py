"""Writes into the head of each recipe that ships what `esft plan` says that it needs.

Usage, from the repository's root: python -m tools.recipe_headers [NAME ...]

The large models are planned from their configurations alone (tests/golden/configs), with every row
full: neither their weights nor a user's rows are here.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from esft.locating import TINY_MOE
from esft.planning import plan
from esft.plans.records import Case, Plan
from esft.recipe import read_recipe
from esft.shipped import ShippedRecipe, list_recipes
from tests.shrunken import config_file

MARK = "# Needs"
_WIDTH = 98
# What the paper's authors published of their profiles (github.com/deepseek-ai/ESFT): without a
# profile, a rule with raw mass has no bounds that would help.
_OFFICIAL = Path(__file__).parents[2] / "shared" / "golden" / "official-esft"
_SCORED = {
    "deepseek-ai/DeepSeek-V2-Lite": [
        _OFFICIAL / f"{task}.scores.json" for task in ("intent", "translation")
    ]
}
# GPUs that there are, in GB of memory; a plan counts tensors only, hence a tenth more.
_GPUS = (24, 48, 80, 141, 192, 288)
_ROOM = 1.1


@dataclass(frozen=True)
class Needs:
    """What a recipe needs at least and at most.

    Attributes:
        device: `cpu` or `cuda`.
        few: the case with the fewest experts.
        many: the one with the most.
        experts: how many these are, in words.
    """

    device: str
    few: Case
    many: Case
    experts: str


def needs(recipe: ShippedRecipe) -> str:
    """Return the last paragraph of a recipe's head, as comment lines."""
    found = planned(recipe)
    few, many = found.few, found.many
    peaks = _between(_peak(few), _peak(many))
    if found.device == "cpu":
        words = f"Needs, by `esft plan`: {peaks} of memory for tensors{found.experts}"
    else:
        words = f"Needs, by `esft plan`: {peaks} of a GPU's memory{found.experts} ({_gpu(many)})"
    words += f"; {_between(few.disk.delta / 1e9, many.disk.delta / 1e9)} for the delta"
    if many.disk.checkpoints:
        words += f", up to {_rounded(many.disk.total / 1e9)} GB on disk with checkpoints"
    words += "."
    if found.device == "cuda":
        words += " No GPU was to be had so far: nothing of this was run."
    lines = textwrap.wrap(words, _WIDTH - 2, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def planned(recipe: ShippedRecipe) -> Needs:
    """Plan a recipe: on a CPU for the tiny model, on a GPU for large ones."""
    if recipe.model == TINY_MOE:
        found = plan(read_recipe(recipe.file), device="cpu")
        return Needs("cpu", found.few, found.many, _experts(found))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config_file(recipe.model).read_bytes())
        read = read_recipe(recipe.file, [f"model={folder}"])
        if recipe.model not in _SCORED:
            found = plan(read, device="cuda")
            return Needs("cuda", found.few, found.many, _experts(found))
        cases = [plan(read, scores=file, device="cuda").many for file in _SCORED[recipe.model]]
    few, many = min(cases, key=_peak), max(cases, key=_peak)
    words = f" with the {few.experts} or {many.experts} experts of two of the paper's tasks"
    return Needs("cuda", few, many, words)


def headed(recipe: ShippedRecipe) -> str:
    """Return a recipe's text with the present figures in its head."""
    head, mark, rest = recipe.file.read_text(encoding="utf-8").partition(MARK)
    assert mark, recipe.file
    body = rest[rest.index("\nmodel:") + 1 :]
    return head + needs(recipe) + body


def _experts(found: Plan) -> str:
    few, many = found.few, found.many
    if not many.experts:
        return ""
    if few.experts == many.experts:
        return f" with {many.experts} experts"
    return f" with {few.fewest} to {many.most} experts a layer, as the task's routing has it"


def _gpu(case: Case) -> str:
    fits = [size for size in _GPUS if size >= _ROOM * _peak(case)]
    return f"one of {fits[0]} GB will do" if fits else "more than any has today"


def _peak(case: Case) -> float:
    """Return the most memory, in GB."""
    assert case.memory.peak is not None
    return case.memory.peak / 1e9


def _between(low: float, high: float) -> str:
    """Return two sizes in GB, or one if they are shown alike; small ones in MB."""
    unit, factor = ("MB", 1000) if high < 0.1 else ("GB", 1)
    shown = dict.fromkeys(_rounded(factor * value) for value in (low, high))
    return f"{' to '.join(shown)} {unit}"


def _rounded(value: float) -> str:
    """Two digits: a plan promises no more than a tenth."""
    return f"{float(f'{value:.2g}'):g}"


if __name__ == "__main__":
    for shipped in list_recipes():
        if shipped.command == "train" and (len(sys.argv) == 1 or shipped.name in sys.argv[1:]):
            shipped.file.write_text(headed(shipped), encoding="utf-8")
            print(shipped.name)

"""What a run will need, before it is run: parameters, memory, disk, operations, time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft.errors import EsftError
from esft.loading import pick_device
from esft.plans.memory_size import memory_bytes
from esft.plans.optimizers import optimizer_name
from esft.plans.planner import Planner
from esft.plans.quantised import check_load_in
from esft.plans.records import Plan
from esft.progress import SILENT, Reporter
from esft.recipe import as_recipe
from esft.recipe_sections import Recipe
from esft.run.fields import with_defaults
from esft.scores import Scores

DEVICES = ("cpu", "cuda")


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    scores: Scores | str | Path | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    processes: int = 1,
    load_in: str | None = None,
    probe: bool = False,
    reporter: Reporter = SILENT,
) -> Plan:
    """Say what training by a recipe will need. Reads no weights: their headers, or none at all.

    The model is built from its configuration on tensors without content, and taken through the
    steps of the run, see `esft.plans`; figures of memory are of tensors, without what a process,
    a GPU's driver and an allocator need beside them.

    Args:
        recipe: a recipe, its keys as a mapping, or the path of a YAML file. Its training rows are
            read if they are files here; where they are not, the most that could be is assumed.
        scores: of the model's experts on the task, or their file: then the number of experts is
            known, which otherwise, under a rule with p, lies between two bounds.
        device: `cpu` or `cuda`, what the run is to be on; it need not be here. None takes the
            recipe's, or the one that a run here would take.
        memory: of the device, such as `80GB`; says whether the run fits, and what would make it.
        processes: of a run with several, one a device.
        load_in: `4bit` or `8bit`: say what transformers' loader would really quantise.
        probe: take a few real steps here, and say how long the run would take at that speed.
        reporter: shown the progress.

    Raises:
        RecipeError: the recipe is wrong.
        ModelError: the model is not there, of an unknown family, or a file's header is damaged.
        SelectionError: the selection does not fit the model, or the scores cannot be read.
        EsftError: `memory`, `processes` or `device` is wrong.
    """
    limit = None if memory is None else memory_bytes(memory)
    if processes < 1:
        raise EsftError(f"--processes {processes}: must be at least 1")
    if isinstance(scores, str | Path):
        scores = Scores.read(scores)
    checked = with_defaults(as_recipe(recipe))
    planner = Planner(checked, scores, _device(device, checked))
    asked = load_in and check_load_in(
        planner.skeleton, planner.anatomy.layers, load_in, planner.stored.dtype
    )
    few, many = planner.cases(reporter)
    taken = planner.probe(many) if probe else None
    return Plan(
        model=checked.model,
        method=checked.method,
        device=planner.device,
        dtype=planner.dtype_name,
        param_dtype=checked.param_dtype,
        optimizer=optimizer_name(checked.training),
        parameters=planner.parameters,
        stored=planner.stored,
        batch=planner.batch,
        selection=planner.choice.words,
        few=few,
        many=many,
        inference=planner.inference,
        fit=None if limit is None else planner.fit(many, limit, reporter),
        processes=planner.processes(many, processes, taken) if processes > 1 else None,
        load_in=asked or None,
        probe=taken,
        notes=tuple(planner.notes(many, processes)),
    )


def _device(asked: str | None, recipe: Recipe) -> str:
    name = asked or recipe.device
    kind = pick_device().type if name is None else name.partition(":")[0]
    if kind not in DEVICES:
        raise EsftError(f"--device {name}: a plan is for {' or '.join(DEVICES)}")
    return kind

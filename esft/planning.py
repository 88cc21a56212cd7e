"""What a run will need, before it is run: parameters, memory, disk, operations, time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from esft.errors import EsftError
from esft.loading import load_skeleton, pick_device, pick_dtype
from esft.locating import TINY_MOE, resolve
from esft.moe import Anatomy, anatomy
from esft.plans.batch import Batch, plan_batch
from esft.plans.cases import make_case
from esft.plans.counts import Choice, Chosen, choose
from esft.plans.fitting import fit
from esft.plans.memory_size import memory_bytes
from esft.plans.optimizers import optimizer_name
from esft.plans.parameters import by_kind
from esft.plans.probe import take_probe
from esft.plans.quantised import check_load_in
from esft.plans.records import Case, Fit, Plan, Probe
from esft.plans.scaling import largest_layer, scaled
from esft.plans.stored import Stored, read_stored
from esft.profiling import context_length, tokens_at_once
from esft.progress import SILENT, Reporter
from esft.recipe import as_recipe
from esft.recipe_sections import Recipe, SelectionSpec
from esft.run.choice import selection_rule
from esft.run.drift import TOKENS
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
        fit=None if limit is None else planner.fit(many, limit, reporter),
        processes=scaled(many.memory, processes, planner.largest) if processes > 1 else None,
        load_in=asked or None,
        probe=planner.probe(many) if probe else None,
        notes=tuple(planner.notes(many, processes)),
    )


@dataclass(frozen=True)
class Planner:
    """One recipe on one device; what does not change from case to case is found once.

    Attributes:
        recipe: with defaults.
        scores: of the experts, if known.
        device: `cpu` or `cuda`.
    """

    recipe: Recipe
    scores: Scores | None
    device: str

    @cached_property
    def folder(self) -> Path:
        """The model's."""
        return resolve(self.recipe.model, weights=False)

    @property
    def hub_id(self) -> str | None:
        """Its name on the hub, if it comes from there."""
        model = self.recipe.model
        return None if model == TINY_MOE or Path(model).expanduser().is_dir() else model

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device."""
        return load_skeleton(self.folder)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its anatomy."""
        return anatomy(self.skeleton)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Its parameters by kind."""
        return by_kind(self.skeleton, self.anatomy.layers)

    @cached_property
    def stored(self) -> Stored:
        """The checkpoint on disk."""
        return read_stored(self.folder, self.anatomy.total, self.hub_id)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What weights are loaded in."""
        asked = pick_dtype(self.recipe.dtype, torch.device(self.device))
        return self.stored.dtype if isinstance(asked, str) else asked

    @cached_property
    def batch(self) -> Batch:
        """The heaviest."""
        return plan_batch(self.recipe, self.folder)

    @cached_property
    def choice(self) -> Choice:
        """The experts that train, or the bounds of their number."""
        width = self.stored.dtype.itemsize
        return choose(self.recipe, self.anatomy, self.scores, width)

    @cached_property
    def profiled(self) -> tuple[int, int]:
        """Rows and tokens of each that experts are scored on at once; 0 rows for none."""
        recipe = self.recipe
        by_rule = (recipe.selects_experts or recipe.matches_esft) and not isinstance(
            recipe.selection, str
        )
        if not by_rule and not (recipe.routing_drift and self.choice.many.selection):
            return 0, 0
        spec = selection_rule(recipe) if by_rule else SelectionSpec()
        length = context_length(self.skeleton, spec.seq_len)
        tokens = min(tokens_at_once(self.device), spec.tokens if by_rule else TOKENS)
        return max(1, tokens // length), min(length, tokens)

    def cases(self, reporter: Reporter = SILENT) -> tuple[Case, Case]:
        """Return the case with the fewest experts and that with the most."""
        with reporter.task("rehearsing", total=2 - self.choice.known, unit="case") as task:
            many = self.case(self.choice.many)
            task.advance()
            if self.choice.known:
                return many, many
            few = self.case(self.choice.few)
            task.advance()
        return few, many

    def case(self, chosen: Chosen) -> Case:
        """Rehearse the run with these experts."""
        return make_case(
            self.recipe,
            self.skeleton.config,
            device=self.device,
            dtype=self.dtype,
            stored=self.stored,
            total=self.anatomy.total,
            chosen=chosen,
            batch=self.batch,
            profiled=self.profiled,
        )

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest layer's weights."""
        return largest_layer(self.skeleton, self.dtype.itemsize)

    def changed(self, recipe: Recipe) -> Planner:
        """Return the planner of another recipe for the same model; what is known stays known."""
        other = replace(self, recipe=recipe)
        for name in ("folder", "skeleton", "anatomy", "parameters", "stored"):
            vars(other)[name] = getattr(self, name)
        return other

    def fit(self, many: Case, limit: int, reporter: Reporter = SILENT) -> Fit:
        """Say whether the larger case fits, and what would make it."""
        with reporter.task("looking for what would fit", total=1, unit="plan") as task:
            found = fit(
                self.recipe,
                many,
                self.batch,
                limit,
                device=self.device,
                per_expert=self.anatomy.per_expert,
                experts=min(layer.num_experts for layer in self.anatomy.layers),
                largest=self.largest,
                rehearse=self._rehearse,
            )
            task.advance()
        return found

    def _rehearse(self, recipe: Recipe) -> Case:
        planner = self.changed(recipe)
        return planner.case(planner.choice.many)

    def probe(self, many: Case) -> Probe:
        """Take real steps here."""
        if many.flops is None or many.memory.peak is None:
            raise EsftError("--probe: this family's operations cannot be counted")
        return take_probe(
            self.recipe,
            self.skeleton,
            self.choice.many,
            self.batch,
            device=self.device,
            dtype=self.dtype,
            width=self.stored.dtype.itemsize,
            flops=many.flops,
            peak=many.memory.peak,
        )

    def notes(self, many: Case, processes: int) -> Iterator[str]:
        """Say what a reader should know beside the figures."""
        if not self.stored.measured:
            yield f"{self.stored.why}: sizes are the configuration's"
        if many.obstacle is not None:
            yield f"activations are not known: {many.obstacle}"
        if self.device == "cuda":
            yield "computed for a GPU with the PyTorch path of the experts; not measured on one"
        if processes > 1:
            yield "several processes: computed; esft trains in one process so far"
        quantised = getattr(self.skeleton.config, "quantization_config", None)
        if quantised:
            told = quantised if isinstance(quantised, dict) else quantised.to_dict()
            method = told.get("quant_method", "quantised")
            yield (
                f"the checkpoint is quantised ({method}): {self.stored.words}; esft trains none "
                f"such: the figures are those of a copy in {self.dtype_name}"
            )

    @property
    def dtype_name(self) -> str:
        """`dtype` as a recipe calls it."""
        return str(self.dtype).removeprefix("torch.")


def _device(asked: str | None, recipe: Recipe) -> str:
    name = asked or recipe.device
    kind = pick_device().type if name is None else name.partition(":")[0]
    if kind not in DEVICES:
        raise EsftError(f"--device {name}: a plan is for {' or '.join(DEVICES)}")
    return kind

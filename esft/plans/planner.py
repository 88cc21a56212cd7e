"""One recipe on one device: what its run needs, asked for piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from esft.errors import EsftError
from esft.loading import load_skeleton, pick_dtype
from esft.locating import TINY_MOE, resolve
from esft.moe import Anatomy, anatomy
from esft.plans.batch import Batch, plan_batch
from esft.plans.cases import make_case
from esft.plans.counts import Choice, Chosen, choose
from esft.plans.fitting import fit
from esft.plans.inference import Inference, Texts, rehearse_inference
from esft.plans.parameters import by_kind, largest_layer
from esft.plans.probe import take_probe
from esft.plans.records import Case, Fit, Probe, Processes
from esft.plans.scaling import Whole, scaled
from esft.plans.scored import TOKENS as SCORED
from esft.plans.stored import Stored, read_stored
from esft.profiling import context_length, tokens_at_once
from esft.progress import SILENT, Reporter
from esft.recipe_sections import Recipe, SelectionSpec
from esft.run.choice import selection_rule
from esft.run.drift import TOKENS
from esft.scores import Scores


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

    @property
    def selects(self) -> bool:
        """Whether the run itself scores the task's experts and selects some by a rule."""
        recipe = self.recipe
        wanted = recipe.selects_experts or recipe.matches_esft
        return wanted and not isinstance(recipe.selection, str)

    @cached_property
    def profiled(self) -> tuple[int, int] | None:
        """Rows and tokens of each that routing drift is measured on at once; None for none."""
        recipe = self.recipe
        if recipe.matches_esft or not (recipe.routing_drift and self.choice.many.selection):
            return None
        spec = selection_rule(recipe) if self.selects else SelectionSpec()
        return self._profiled(spec.model_copy(update={"tokens": min(spec.tokens, TOKENS)}))

    def _profiled(self, spec: SelectionSpec) -> tuple[int, int]:
        length = context_length(self.skeleton, spec.seq_len)
        tokens = min(tokens_at_once(self.device), spec.tokens)
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
            before=self._before,
        )

    @property
    def _before(self) -> int | None:
        # The base as it is: nothing is in few bits yet, and nothing trains.
        return self.inference.profiling if self.selects else 0

    @cached_property
    def inference(self) -> Inference:
        """The model when it does not train."""
        spec = selection_rule(self.recipe) if self.selects else SelectionSpec()
        length = self.recipe.data.max_length
        texts = Texts(
            profiled=self._profiled(spec),
            sample=spec.tokens,
            scored=(max(1, SCORED // length), length),
            asked=length,
        )
        return rehearse_inference(self.skeleton.config, self.dtype, texts, self.device)

    def whole(self, case: Case) -> Whole:
        """Return what several processes would share."""
        return Whole.of(
            self.recipe,
            case,
            largest=largest_layer(self.skeleton, self.dtype.itemsize),
            experts=self.anatomy.routed * self.dtype.itemsize,
            width=self.dtype.itemsize,
            stored=self.stored.bytes,
        )

    def processes(self, many: Case, count: int, probe: Probe | None) -> Processes:
        """Return what each of several processes needs."""
        speed = None if probe is None else count * probe.tokens_per_second
        return replace(scaled(self.whole(many), count), tokens_per_second=speed)

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
                streamed=self.inference.streaming if self.inference.streams(limit) else None,
                rehearse=self._rehearse,
                whole=lambda recipe, case: self.changed(recipe).whole(case),
            )
            task.advance()
        return replace(found, streams=self.inference.streams(limit))

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
            yield "several processes: computed, not measured"
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

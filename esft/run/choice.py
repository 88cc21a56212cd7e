"""Which experts a run trains: given, or profiled and selected; and how their use is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.data.example import Example
from esft.data.row import Row
from esft.loading import load_skeleton, pick_device, pick_dtype
from esft.moe import Anatomy
from esft.processes import count, rank
from esft.profiling import (
    context_length,
    profile_model,
    sample_rows,
    stored_bytes,
    tokens_at_once,
)
from esft.progress import Reporter
from esft.recipe_sections import Recipe, SelectionSpec
from esft.run.drift import TOKENS, DriftMeter
from esft.run.folder import MATCHED, SELECTION
from esft.scores import Scores
from esft.selection import Selection
from esft.selection_rule import choose_layers, make_rule
from esft.streaming.profiled import profile_streamed
from esft.tally import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def selection_rule(recipe: Recipe) -> SelectionSpec:
    """Return how a recipe wants experts profiled and selected; it names no selection file."""
    spec = recipe.selection
    assert not isinstance(spec, str)  # a file needs no rule
    spec = spec or SelectionSpec()
    if recipe.method == "random" and spec.random is None:
        spec = spec.model_copy(update={"random": spec.seed})
    return spec


def given_selection(recipe: Recipe, anatomy: Anatomy, resumed: Path | None) -> Selection | None:
    """Return the selection where there is one before profiling, or None.

    Args:
        recipe: names a file, or trains every expert, or has a rule.
        anatomy: of the model.
        resumed: folder of the run that goes on, which has selected its experts.

    Returns:
        What trains; or, where LoRA's rank follows from it (`Recipe.matches_esft`), what would.

    Raises:
        SelectionError: the selection, or the rule's layers, do not fit the model.
    """
    layers = {layer.index: layer.num_experts for layer in anatomy.layers}
    if recipe.train is not None and recipe.train.experts == "all":
        return Selection({layer: list(range(experts)) for layer, experts in layers.items()})
    if not (recipe.selects_experts or recipe.matches_esft):
        return None
    if isinstance(recipe.selection, str):
        selection = Selection.read(recipe.selection)
    elif resumed is not None:
        selection = Selection.read(resumed / (MATCHED if recipe.matches_esft else SELECTION))
    else:
        # Or fail before profiling.
        choose_layers(make_rule(**selection_rule(recipe).rule()).layers, layers)
        return None
    selection.check_against(layers)
    return selection


class Sampler:
    """Draws the rows that a run's experts are profiled on, and profiles them.

    Args:
        recipe: says how many tokens, and which count.
        tokenizer: a transformers tokenizer.
        rows: the training set.
        reporter: shown the progress.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Any, rows: Sequence[Row], reporter: Reporter
    ) -> None:
        self._recipe, self._tokenizer, self._rows = recipe, tokenizer, rows
        self._reporter = reporter

    def profile(self, model: PreTrainedModel, folder: Path) -> Scores:
        """Score the model's experts on the training rows, as `esft profile` does.

        Several processes share the sample out.

        Args:
            model: without a selection attached.
            folder: the checkpoint that it was loaded from.
        """
        spec = selection_rule(self._recipe)
        return profile_model(
            model,
            self._sample(model, spec),
            count=spec.count,
            name=self._recipe.model,
            bytes_per_parameter=stored_bytes(folder),
            split=True,
            reporter=self._reporter,
        )

    def profile_streamed(self, folder: Path, *, device: str | None, dtype: str) -> Scores:
        """Score a checkpoint's experts as `profile` does, with two layers in memory at a time.

        Args:
            folder: of the checkpoint.
            device: see `esft.loading.pick_device`.
            dtype: see `esft.loading.pick_dtype`.

        Raises:
            ModelError: the family cannot be profiled so, or a file is missing or damaged.
        """
        spec, place = selection_rule(self._recipe), pick_device(device)
        return profile_streamed(
            folder,
            self._sample(load_skeleton(folder), spec),
            count=spec.count,
            cooccurrence=False,
            name=self._recipe.model,
            bytes_per_parameter=stored_bytes(folder),
            batch_tokens=tokens_at_once(place.type),
            share=Share(rank(), count()),
            device=place,
            dtype=pick_dtype(dtype, place),
            reporter=self._reporter,
        )

    def drift_meter(
        self, model: Any, selection: Selection | None, scores: Scores | None
    ) -> DriftMeter | None:
        """Profile the selected experts before training, where that is asked for.

        Args:
            model: ready to train.
            selection: the experts that train, if any are selected.
            scores: those that they were selected by, if this run has profiled them.
        """
        recipe = self._recipe
        if selection is None or not recipe.routing_drift:
            return None
        spec = SelectionSpec() if isinstance(recipe.selection, str) else selection_rule(recipe)
        # Of a small sample, the scores that the experts were selected by will do.
        known = scores if spec.tokens <= TOKENS else None
        if recipe.frozen.kinds:
            known = None  # these are the base's; what rounding changes is no drift
        spec = spec.model_copy(update={"tokens": min(spec.tokens, TOKENS)})
        sample = self._sample(model, spec)
        return DriftMeter(model, sample, count=spec.count, before=known, reporter=self._reporter)

    def _sample(self, model: PreTrainedModel, spec: SelectionSpec) -> list[Example]:
        seq_len = context_length(model, spec.seq_len)
        return sample_rows(
            self._rows, self._tokenizer, tokens=spec.tokens, seq_len=seq_len, seed=spec.seed
        )

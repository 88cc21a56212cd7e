"""What would make a run fit into memory: changes of its recipe, the cheapest first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from esft.errors import ModelError
from esft.plans.batch import Batch
from esft.plans.optimizers import optimizer_name
from esft.plans.records import Case, Change, Fit
from esft.plans.scaling import Whole, fewest_shards, scaled
from esft.recipe_sections import Recipe, SelectionSpec
from esft.run.choice import selection_rule

# Rehearses the run of a changed recipe with the most experts.
Rehearse = Callable[[Recipe], Case]

_SHORTEST = 128  # tokens
_NARROW = "adamw_bnb_8bit"


@dataclass
class _Search:
    """The changes so far, and the run with all of them."""

    recipe: Recipe
    case: Case
    batch: Batch
    limit: int
    device: str
    rehearse: Rehearse
    keys: dict[str, Any]
    found: list[Change]
    streamed: int | None
    scored: bool = False  # elsewhere, so that the run need not

    @property
    def peak(self) -> int:
        """The most that the run with all changes so far takes."""
        return self.peak_of(self.case)

    def peak_of(self, case: Case) -> int:
        """Return a case's peak, without the scoring of experts if that is done elsewhere."""
        found = case.memory.without_profiling if self.scored else case.memory.peak
        assert found is not None  # or `fit` would not look further
        return found

    def note(self, keys: Mapping[str, Any], words: str, peak: int) -> bool:
        """Write a change down; returns whether it is enough."""
        fits = peak <= self.limit
        self.found.append(Change(dict(keys), words, peak, fits))
        return fits

    def attempt(self, keys: Mapping[str, Any], words: str) -> bool:
        """Rehearse with some keys changed beside those so far; keeps them if memory gets less."""
        recipe = changed(self.recipe, keys)
        case = self.rehearse(recipe)
        if self.peak_of(case) >= self.peak:
            return False
        self.recipe, self.case = recipe, case
        self.keys |= keys
        return self.note(self.keys, words, self.peak)


def fit(
    recipe: Recipe,
    case: Case,
    batch: Batch,
    limit: int,
    *,
    device: str,
    per_expert: int,
    experts: int,
    streamed: int | None,
    rehearse: Rehearse,
    whole: Callable[[Recipe, Case], Whole],
) -> Fit:
    """Say whether a run fits, and if not, what would make it.

    Changes are tried in the order of what they cost the user, each on top of those before, until
    the run fits: experts scored elsewhere, smaller batches (nothing), gradient checkpointing
    (time), frozen weights in few bits, a narrower optimizer state and narrower trained weights
    (precision), fewer experts, shorter rows (data).

    Args:
        recipe: of the run.
        case: with the most experts.
        batch: the heaviest.
        limit: bytes of the device.
        device: `cpu` or `cuda`.
        per_expert: parameters of a routed expert.
        experts: of the layer with the fewest.
        streamed: bytes that `esft profile` would take, where it would stream; else None.
        rehearse: see `Rehearse`.
        whole: what several processes would share of a run.
    """
    peak = case.memory.peak
    if peak is None:
        low = case.memory.without_activations
        words = "activations are not known for this family; weights and states alone take"
        return Fit(limit, low <= limit, (), f"{words} {_gb(low)} of {_gb(limit)}")
    if peak <= limit:
        return Fit(limit, True, (), f"fits: {_gb(peak)} of {_gb(limit)}")
    search = _Search(recipe, case, batch, limit, device, rehearse, {}, [], streamed)
    enough = any(attempt() for attempt in _attempts(search, per_expert, experts))
    if enough:
        last = search.found[-1]
        verdict = f"does not fit: {_gb(peak)} of {_gb(limit)}; with the changes {_gb(last.peak)}"
        return Fit(limit, False, tuple(search.found), verdict)
    last_run = whole(search.recipe, search.case)
    count = fewest_shards(last_run, limit)
    if count is None:
        verdict = f"does not fit: {_gb(peak)} of {_gb(limit)}, and no change of the recipe helps"
        return Fit(limit, False, tuple(search.found), verdict)
    sharded = scaled(last_run, count).sharded_peak
    assert sharded is not None
    words = f"{count} processes, weights and states sharded (FSDP2)"
    search.note(search.keys, words, sharded)
    verdict = (
        f"does not fit: {_gb(peak)} of {_gb(limit)}, and no change of the recipe is enough on one "
        f"device"
    )
    return Fit(limit, False, tuple(search.found), verdict)


def changed(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some keys replaced, given with dots as to `--set`."""
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if key == "selection":
            recipe = recipe.model_copy(update={key: SelectionSpec(**value)})
        elif not name:
            recipe = recipe.model_copy(update={section: value})
        elif section == "training":
            recipe = recipe.model_copy(update={"training": recipe.training | {name: value}})
        else:
            inner = getattr(recipe, section) or SelectionSpec()
            recipe = recipe.model_copy(update={section: inner.model_copy(update={name: value})})
    return recipe


def _attempts(search: _Search, per_expert: int, experts: int) -> Iterator[Callable[[], bool]]:
    if search.peak > (search.case.memory.without_profiling or 0):
        yield lambda: _score_elsewhere(search)
    rows, accumulated = search.batch.rows, search.batch.accumulated
    if rows > 1:
        keys = {
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": rows * accumulated,
        }
        yield lambda: search.attempt(keys, "batches of one row, accumulated: the result stays")
    if not search.recipe.training.get("gradient_checkpointing"):
        yield lambda: search.attempt(
            {"training.gradient_checkpointing": True}, "layers computed twice: about a third slower"
        )
    if search.recipe.selects_experts and search.recipe.frozen_dtype is None:
        for kind, cost in (("int8", "hardly any precision"), ("nf4", "some precision, and time")):
            words = f"frozen weights in {kind}: costs {cost}"
            yield functools.partial(_few_bits, search, kind, words)
    optimizer = optimizer_name(search.recipe.training)
    if search.device == "cuda" and "adamw" in optimizer and "8bit" not in optimizer:
        yield lambda: search.attempt(
            {"training.optim": _NARROW}, "an 8-bit optimizer state (pip install bitsandbytes)"
        )
    if search.recipe.selects_experts:
        if search.recipe.param_dtype == "float32":
            yield lambda: search.attempt(
                {"param_dtype": "bfloat16"}, "what trains in bf16: small updates are rounded away"
            )
        yield lambda: _fewer_experts(search, per_expert, experts)
    length = search.recipe.data.max_length // 2
    while length >= _SHORTEST:
        yield functools.partial(
            search.attempt,
            {"data.max_length": length},
            "shorter rows: longer ones are left out or cut",
        )
        length //= 2


def _score_elsewhere(search: _Search) -> bool:
    """Leave out what scores experts, before training and after it."""
    search.scored = True
    search.keys |= {"selection": "selection.json", "routing_drift": False}
    words = "experts scored in a run of their own (esft profile, esft select)"
    if search.streamed is not None:
        words += f", one layer at a time in {_gb(search.streamed)}"
    return search.note(search.keys, words, search.peak)


def _few_bits(search: _Search, kind: str, words: str) -> bool:
    try:
        return search.attempt({"frozen_dtype": kind}, words)
    except ModelError:  # a family whose own code takes one expert at a time
        return False


def _fewer_experts(search: _Search, per_expert: int, experts: int) -> bool:
    """Try the most experts a layer that fit, as far as what one costs can be told."""
    case, memory = search.case, search.case.memory
    if not case.experts:
        return False
    each = (memory.trained + memory.gradients + memory.optimizer + memory.start) / case.trained
    layers = case.experts / case.most  # as many as have the most
    most = case.most - math.ceil((search.peak - search.limit) / (per_expert * layers * each))
    if most < 1:
        return False
    spec = search.recipe.selection
    rule = selection_rule(search.recipe).rule() if not isinstance(spec, str) else {"top_n": 1}
    if "top_n" in rule or "budget" in rule:
        keys: dict[str, Any] = {"selection": {"top_n": most}}
    else:
        # The largest selection under p has ceil(p * E) experts, see `esft.plans.counts`.
        keys = {"selection.p": math.floor(1000 * most / experts) / 1000}
    return search.attempt(keys, f"at most {most} experts a layer")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"

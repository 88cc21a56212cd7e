"""How many experts a recipe trains in each layer: known, or between which bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esft.moe import Anatomy, MoeLayer
from esft.ranking import affordable
from esft.recipe_sections import Recipe
from esft.run.choice import given_selection, selection_rule
from esft.scores import Scores
from esft.selection import Selection, select
from esft.selection_rule import Rule, choose_layers, make_rule


@dataclass(frozen=True)
class Chosen:
    """A selection that a run may come to.

    Attributes:
        selection: the experts; where only their number is known, the first ones. None where no
            routed expert is selected.
        routed: share of a layer's routed rows that go to them.
    """

    selection: Selection | None
    routed: float

    def per_layer(self) -> list[int]:
        """Return how many experts each layer with any has."""
        experts = {} if self.selection is None else self.selection.experts
        return [len(ids) for ids in experts.values()]


@dataclass(frozen=True)
class Choice:
    """What a recipe's selection comes to.

    Attributes:
        few: the smallest selection that is possible.
        many: the largest; the same where the number of experts is known.
        words: how that is known, or what the bounds are.
    """

    few: Chosen
    many: Chosen
    words: str

    @property
    def known(self) -> bool:
        """Whether there is nothing to choose between."""
        return self.few is self.many


def choose(recipe: Recipe, found: Anatomy, scores: Scores | None, width: int) -> Choice:
    """Say how many experts a recipe trains.

    Args:
        recipe: of the run.
        found: the model's anatomy.
        scores: of its experts on the task, if they were profiled already.
        width: bytes of a parameter in the checkpoint; what a budget in bytes counts.

    Raises:
        SelectionError: the selection's file or its rule does not fit the model or the scores.
    """
    given = given_selection(recipe, found, None)
    if not (recipe.selects_experts or recipe.matches_esft):
        chosen = Chosen(given, 1.0)
        return Choice(chosen, chosen, "all routed experts" if given else "no routed expert")
    if given is not None:
        chosen = Chosen(given, _even(given, found.layers))
        return Choice(chosen, chosen, f"the experts of {recipe.selection}")
    options = selection_rule(recipe).rule()
    if scores is not None:
        picked = select(scores, **options)
        chosen = Chosen(picked, _measured(picked, scores))
        return Choice(chosen, chosen, "the recipe's rule under the scores given")
    return _bounds(make_rule(**options), found, width)


def _bounds(rule: Rule, found: Anatomy, width: int) -> Choice:
    layers = {layer.index: layer for layer in found.layers}
    inside = [layers[index] for index in choose_layers(rule.layers, layers)]
    if rule.top_n is not None:
        chosen = _first(inside, [rule.top_n] * len(inside))
        return Choice(chosen, chosen, f"{rule.top_n} experts a layer")
    if rule.budget is not None:
        sizes = {
            "expert_parameters": found.per_expert,
            "parameters": found.total,
            "bytes_per_parameter": width,
        }
        total = affordable(rule.budget, sizes)
        even = [total // len(inside) + (i < total % len(inside)) for i in range(len(inside))]
        chosen = _first(inside, even)
        words = f"the {total:,} experts that {rule.budget.text} pays for, spread evenly"
        return Choice(chosen, chosen, words)
    few = _first(inside, [_fewest(rule, layer) for layer in inside], rule.p)
    many = _first(inside, [_most(rule, layer) for layer in inside], rule.p)
    how = "p auto" if rule.p is None else f"p = {rule.p:g}"
    if rule.mass == "raw" and rule.metric == "gate":
        worst = "all experts where a layer's raw gate mass stays below p"
    else:
        worst = "the tokens spread evenly over all experts" if rule.p else "every expert"
    best = "each token goes to the same experts" if rule.metric == "token" else "to one expert"
    if few.per_layer() == many.per_layer():
        return Choice(many, many, f"{how}: the same number however the tokens are spread")
    words = f"{how}, task not profiled: from the fewest ({best}) to the most ({worst})"
    return Choice(few, many, words)


def _fewest(rule: Rule, layer: MoeLayer) -> int:
    """Count the experts of a layer whose scores are as concentrated as they can be."""
    # Of `token`, no expert has more than 1/K: a token chooses K different ones.
    least = max(1, math.ceil((rule.p or 0) * layer.top_k - 1e-9)) if rule.metric == "token" else 1
    return _whole_groups(least, rule, layer)


def _most(rule: Rule, layer: MoeLayer) -> int:
    """Count them where all experts have the same score, which is the worst case for a sum."""
    E = layer.num_experts
    if rule.p is None or (rule.mass == "raw" and rule.metric == "gate"):
        return E
    return _whole_groups(max(1, math.ceil(rule.p * E - 1e-9)), rule, layer)


def _whole_groups(count: int, rule: Rule, layer: MoeLayer) -> int:
    size = rule.group or 1
    return min(layer.num_experts, -(-count // size) * size)


def _first(
    layers: Sequence[MoeLayer], counts: Sequence[int], routed: float | None = None
) -> Chosen:
    pairs = zip(layers, counts, strict=True)
    experts = {x.index: list(range(min(count, x.num_experts))) for x, count in pairs}
    selection = Selection(experts)
    share = _even(selection, layers)
    return Chosen(selection, share if routed is None else max(share, routed))


def _even(selection: Selection, layers: Sequence[MoeLayer]) -> float:
    """Return the share of rows that the experts get where all have as many."""
    sizes = {layer.index: layer.num_experts for layer in layers}
    parts = [len(ids) / sizes[index] for index, ids in selection.experts.items()]
    return sum(parts) / len(parts)


def _measured(selection: Selection, scores: Scores) -> float:
    parts = [
        sum(scores.layers[layer].token[expert] for expert in ids)
        for layer, ids in selection.experts.items()
    ]
    return sum(parts) / len(parts)

"""A selection: per layer, the experts to train, best first; and the rule that made it.

The file format `esft-selection/1`, a superset of the official ESFT configuration, is described in
docs/selection-format.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from esft.cutoff import until_p
from esft.errors import SelectionError, nearest
from esft.files import read_json, write_json
from esft.ranking import affordable, best, draw, rounded, within
from esft.scores import UNKNOWN_MODEL, Scores, layer_index, read_model
from esft.selection_rule import choose_layers, make_rule

FORMAT = "esft-selection/1"
_KEYS = ("format", "experts", "shared_experts", "non_expert_modules", "rule", "model")


@dataclass(frozen=True)
class Summary:
    """What training a selection costs; None where the model's sizes are not known.

    Attributes:
        layers: layers with at least one selected expert.
        experts: selected experts in all layers.
        fewest: experts of the layer with the fewest; `median` and `most` likewise.
        parameters: parameters of the selected experts.
        share_of_model: of all parameters of the model.
        share_of_experts: of the parameters of its routed experts.
        delta_bytes: bytes of the delta's weights, in the checkpoint's dtype.
    """

    layers: int
    experts: int
    fewest: int
    median: float
    most: int
    parameters: int | None
    share_of_model: float | None
    share_of_experts: float | None
    delta_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """The experts to train.

    Attributes:
        experts: by the model's own layer index, expert ids, best first; no layer is empty.
        shared_experts: whether the layers' shared experts are trained too.
        non_expert_modules: whether everything that is no expert is trained too.
        rule: the options that made it; empty for an explicit list.
        model: the model that the scores were taken on, keys of `esft.scores.UNKNOWN_MODEL`.

    Raises:
        SelectionError: it is empty, or a layer has an id twice or a negative one.
    """

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    rule: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: dict(UNKNOWN_MODEL))

    def __post_init__(self) -> None:
        if not any(self.experts.values()):
            raise SelectionError("the selection is empty: no expert in any layer")
        for layer, ids in self.experts.items():
            for expert in ids:
                if expert < 0:
                    raise SelectionError(f"layer {layer}: expert id {expert} is negative")
            if twice := sorted({expert for expert in ids if ids.count(expert) > 1}):
                raise SelectionError(f"layer {layer}: expert {twice[0]} is in it twice")
        kept = {layer: list(ids) for layer, ids in sorted(self.experts.items()) if ids}
        object.__setattr__(self, "experts", kept)

    def check_against(self, layers: Mapping[int, int]) -> None:
        """Check that a model has every selected expert.

        Args:
            layers: E by layer index, for the layers with routed experts.

        Raises:
            SelectionError: a layer has no routed experts, or an id is too high.
        """
        for layer, ids in self.experts.items():
            if layer not in layers:
                known = ", ".join(str(index) for index in sorted(layers))
                raise SelectionError(
                    f"the selection has layer {layer}, but the model's layers with routed experts "
                    f"are {known}"
                )
            if max(ids) >= layers[layer]:
                raise SelectionError(
                    f"the selection has expert {max(ids)} in layer {layer}, but the model's "
                    f"experts there are 0 to {layers[layer] - 1}"
                )

    def summary(self) -> Summary:
        """Count experts, parameters and bytes."""
        sizes = [len(ids) for ids in self.experts.values()]
        per_expert = self.model.get("expert_parameters")
        parameters = per_expert and per_expert * sum(sizes)
        width = self.model.get("bytes_per_parameter")
        return Summary(
            layers=len(sizes),
            experts=sum(sizes),
            fewest=min(sizes),
            median=statistics.median(sizes),
            most=max(sizes),
            parameters=parameters,
            share_of_model=_ratio(parameters, self.model.get("parameters")),
            share_of_experts=_ratio(parameters, self.model.get("routed_parameters")),
            delta_bytes=parameters and width and parameters * width,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of an `esft-selection/1` file."""
        return {
            "format": FORMAT,
            "experts": {str(layer): ids for layer, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
            "rule": self.rule,
            "model": self.model,
        }

    def write(self, path: str | Path) -> None:
        """Write the selection as `esft-selection/1`, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file of ours, an official configuration, or a plain `{"1": [8, 26]}`.

        Raises:
            SelectionError: the file is missing, damaged, of another kind, or selects nothing.
        """
        content = read_json(Path(path), "selection file", SelectionError)
        return cls.from_dict(content, where=str(path))

    @classmethod
    def from_dict(cls, value: Any, where: str = "selection") -> Self:
        """Check and take over the content of a selection file, or a mapping of layers to ids.

        Args:
            value: the parsed JSON; layer keys may be integers too, as YAML gives them.
            where: what errors call it.

        Raises:
            SelectionError: as `read`.
        """
        if not isinstance(value, dict):
            raise SelectionError(f"{where}: expected a JSON object with selected experts")
        if "experts" not in value and not any(key in value for key in _KEYS):
            value = {"experts": value}
        if value.get("format", FORMAT) != FORMAT:
            raise SelectionError(f'{where}: format: expected "{FORMAT}", found "{value["format"]}"')
        for key in value:
            if key not in _KEYS:
                raise SelectionError(f'{where}: unknown key "{key}"{nearest(str(key), _KEYS)}')
        flags = {key: value.get(key, False) for key in ("shared_experts", "non_expert_modules")}
        for key, flag in flags.items():
            if not isinstance(flag, bool):
                raise SelectionError(f"{where}: {key}: expected true or false")
        rule = value.get("rule", {})
        if not isinstance(rule, dict):
            raise SelectionError(f"{where}: rule: not a JSON object")
        experts = _read_experts(value.get("experts"), where)
        model = read_model(value.get("model", {}), where)
        try:
            return cls(experts, rule=rule, model=model, **flags)
        except SelectionError as error:
            raise SelectionError(f"{where}: {error}") from None


def select(
    scores: Scores,
    *,
    metric: str | None = None,
    p: float | str | None = None,
    cover: float | None = None,
    mass: str | None = None,
    round: int | None = None,
    top_n: int | None = None,
    budget: str | int | None = None,
    group: int | None = None,
    layers: str | int | Iterable[int] | None = None,
    random: int | None = None,
    random_from: str | None = None,
    preset: str | None = None,
) -> Selection:
    """Select the experts to train, per layer, best first; ties go to the lower id.

    With `p`, experts are added while the running sum of their scores is below p, so the expert
    that crosses p is in (arXiv 2407.01906). Sums run in the order of the ranking, in float64.

    Args:
        scores: from `profile`, or read from a file.
        metric: `token` (TSR, the default) or `gate` (AGS).
        p: above 0 and at most 1; 0.2 unless `top_n` or `budget` is given. `auto` finds the
            smallest that is stable and reaches `cover`, see `esft.stability.choose_p`.
        cover: with `p="auto"`, how much of the scores of the sample's other half the experts
            chosen on one half must get; 0.2 unless given.
        mass: what p is a part of: `share` divides a layer's scores by their sum (the default),
            `raw` takes them as they are.
        round: round scores to this many decimals first.
        top_n: this many experts in each layer.
        budget: as much as fits, best share first over all layers: `5%` of the model's
            parameters, `500MB` of delta, or a number of parameters.
        group: with `p`, select whole groups of 2 or 4 experts that serve the same tokens, see
            `esft.grouping`.
        layers: only these, such as `3-20,22`.
        random: a seed; as many experts per layer as the rule selects, but drawn at random: a
            control.
        random_from: with `random`, draw from `all` of the layer's experts (the default), or from
            the `unselected`, those that the rule leaves out.
        preset: `official-token` or `official-gate`.

    Raises:
        SelectionError: an option is out of range, two contradict each other, the scores do not
            say what the rule needs, nothing is selected, or no p reaches `cover`.
    """
    rule = make_rule(
        metric=metric,
        p=p,
        cover=cover,
        mass=mass,
        round=round,
        top_n=top_n,
        budget=budget,
        group=group,
        layers=layers,
        random=random,
        random_from=random_from,
        preset=preset,
    )
    chosen = choose_layers(rule.layers, scores.layers)
    wanted = {layer: scores.layers[layer] for layer in chosen}
    rows = {layer: rounded(x.metric(rule.metric), rule.round) for layer, x in wanted.items()}
    auto = None
    if rule.budget is not None:
        experts = within(rows, affordable(rule.budget, scores.model))
    elif rule.top_n is not None:
        experts = {layer: best(row, rule.top_n, layer) for layer, row in rows.items()}
    else:
        experts, auto = until_p(rule, wanted)
    if rule.random is not None:
        experts = {
            layer: draw(
                rule.random,
                layer,
                scores.layers[layer].experts,
                len(ids),
                without=ids if rule.random_from == "unselected" else (),
            )
            for layer, ids in experts.items()
        }
    written = rule.to_dict(scores.sample.get("count"))
    if auto is not None:
        written |= {"p": auto.p, "auto": auto.to_dict()}
    return Selection(experts, rule=written, model=dict(scores.model))


def _read_experts(value: Any, where: str) -> dict[int, list[int]]:
    if not isinstance(value, dict):
        raise SelectionError(f'{where}: experts: expected an object such as {{"1": [8, 26]}}')
    experts: dict[int, list[int]] = {}
    for key, ids in value.items():
        layer = layer_index(key, f"{where}: experts")
        if not isinstance(ids, list) or not all(type(item) is int for item in ids):
            raise SelectionError(f"{where}: layer {layer}: expected a list of expert ids")
        if layer in experts:
            raise SelectionError(f"{where}: layer {layer} is in it twice")
        experts[layer] = ids
    return experts


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None

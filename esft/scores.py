"""Relevance scores: how much a task uses each routed expert of each layer.

The file format `esft-scores/1` is described in docs/scores-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from esft.errors import EsftError, SelectionError, nearest
from esft.files import read_json, write_json

FORMAT = "esft-scores/1"
METRICS = ("token", "gate")

# What the scores say of the model they were taken on; None where it is not known.
MODEL_TEXTS = ("name", "model_type", "architecture")
MODEL_SIZES = ("parameters", "routed_parameters", "expert_parameters", "bytes_per_parameter")
UNKNOWN_MODEL: dict[str, Any] = dict.fromkeys((*MODEL_TEXTS, *MODEL_SIZES))

_KEYS = ("format", "model", "sample", "layers", "stability")
_LAYER_KEYS = ("experts", "top_k", "tokens", "token", "gate")
_OFFICIAL = {"token": "token_scores", "gate": "gate_scores"}


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer's E routed experts.

    Attributes:
        experts: E.
        top_k: K, experts per token; None where unknown.
        tokens: tokens counted; None where unknown.
        token: TSR, `[E]`: share of the tokens whose top-K holds the expert, divided by K.
        gate: AGS, `[E]`: mean gate value over the tokens, 0 where the expert is not in the top-K.
    """

    experts: int
    top_k: int | None
    tokens: int | None
    token: list[float]
    gate: list[float]

    def metric(self, name: str) -> list[float]:
        """Return the scores `[E]` of a metric, `token` or `gate`."""
        return {"token": self.token, "gate": self.gate}[name]


@dataclass(frozen=True)
class Scores:
    """The scores of a model on a sample of a task's data.

    Attributes:
        layers: scores by the model's own layer index.
        model: the model; the keys of `UNKNOWN_MODEL`.
        sample: what was counted: `data`, `count`, `tokens`, `sequences`, `seq_len`, `seed`.
        stability: per metric, the share of the experts selected at `p` that stay selected when
            half of the sample is used; empty where unknown.
    """

    layers: dict[int, LayerScores]
    model: dict[str, Any] = field(default_factory=lambda: dict(UNKNOWN_MODEL))
    sample: dict[str, Any] = field(default_factory=dict)
    stability: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of an `esft-scores/1` file."""
        return {
            "format": FORMAT,
            "model": self.model,
            "sample": self.sample,
            "stability": self.stability,
            "layers": {
                str(index): {key: getattr(layer, key) for key in _LAYER_KEYS}
                for index, layer in sorted(self.layers.items())
            },
        }

    def write(self, path: str | Path) -> None:
        """Write the scores as `esft-scores/1`, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file of ours, or one that the official ESFT code wrote.

        Raises:
            SelectionError: the file is missing, damaged or of another kind; the message names
                the file, the layer and the key.
        """
        try:
            return cls.from_dict(read_json(Path(path), "scores file"), where=str(path))
        except SelectionError:
            raise
        except EsftError as error:
            raise SelectionError(str(error)) from None

    @classmethod
    def from_dict(cls, value: Any, where: str = "scores") -> Self:
        """Check and take over the content of a scores file, ours or an official one.

        Args:
            value: the parsed JSON.
            where: what errors call it.

        Raises:
            SelectionError: as `read`.
        """
        if not isinstance(value, dict):
            raise SelectionError(f"{where}: expected a JSON object with scores")
        if any(key in value for key in _OFFICIAL.values()):
            return cls(_official_layers(value, where))
        if value.get("format") != FORMAT:
            raise SelectionError(
                f'{where}: not a scores file: expected "format": "{FORMAT}", or the official '
                f'keys "token_scores" and "gate_scores"'
            )
        _known_keys(value, _KEYS, where)
        return cls(
            layers=_own_layers(_mapping(value.get("layers"), f"{where}: layers"), where),
            model=_model(_mapping(value.get("model", {}), f"{where}: model"), where),
            sample=dict(_mapping(value.get("sample", {}), f"{where}: sample")),
            stability={
                name: _number(share, f"{where}: stability: {name}")
                for name, share in _mapping(
                    value.get("stability", {}), f"{where}: stability"
                ).items()
            },
        )


def read_model(value: Any, where: str) -> dict[str, Any]:
    """Check what a scores or selection file says of its model; absent facts become None.

    Raises:
        SelectionError: a fact has the wrong type; the message starts with `where`.
    """
    return _model(_mapping(value, f"{where}: model"), where)


def layer_index(key: Any, where: str) -> int:
    """Return the layer index that a JSON key or a YAML integer stands for.

    Raises:
        SelectionError: it is not a whole number written the plain way.
    """
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if isinstance(key, str) and key.isdecimal() and key.isascii() and str(int(key)) == key:
        return int(key)
    raise SelectionError(f'{where}: "{key}" is not a layer; expected a number such as "1"')


def _model(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in MODEL_TEXTS:
        if not isinstance(value.get(key), str | None):
            raise SelectionError(f"{where}: model: {key}: expected text")
    for key in MODEL_SIZES:
        _count(value.get(key), f"{where}: model: {key}")
    return {**UNKNOWN_MODEL, **value}


def _own_layers(value: Mapping[str, Any], where: str) -> dict[int, LayerScores]:
    layers = {}
    for key, item in value.items():
        index = layer_index(key, f"{where}: layers")
        place = f"{where}: layer {index}"
        layer = _mapping(item, place)
        _known_keys(layer, _LAYER_KEYS, place)
        experts = _count(layer.get("experts"), f"{place}: experts")
        if experts is None:
            raise SelectionError(f"{place}: experts: missing; expected the number of experts")
        top_k = _count(layer.get("top_k"), f"{place}: top_k")
        if top_k is not None and top_k > experts:
            raise SelectionError(f"{place}: top_k: {top_k} of {experts} experts")
        layers[index] = LayerScores(
            experts=experts,
            top_k=top_k,
            tokens=_count(layer.get("tokens"), f"{place}: tokens"),
            token=_row(layer.get("token"), experts, f"{place}: token"),
            gate=_row(layer.get("gate"), experts, f"{place}: gate"),
        )
    return _some(layers, where)


def _official_layers(value: Mapping[str, Any], where: str) -> dict[int, LayerScores]:
    tables: dict[str, dict[int, list[float]]] = {}
    for metric, name in _OFFICIAL.items():
        tables[metric] = {}
        for key, item in _mapping(value.get(name), f"{where}: {name}").items():
            index = layer_index(key, f"{where}: {name}")
            place = f"{where}: {name}: layer {index}"
            scores = _mapping(item, place)
            if set(scores) != {str(expert) for expert in range(len(scores))}:
                raise SelectionError(
                    f"{place}: expected the experts 0 to {len(scores) - 1}, each once"
                )
            row = [scores[str(expert)] for expert in range(len(scores))]
            tables[metric][index] = _row(row, len(row), place)
    token, gate = tables["token"], tables["gate"]
    for index in sorted(token.keys() | gate.keys()):
        sizes = [len(table.get(index, [])) for table in (token, gate)]
        if sizes[0] != sizes[1]:
            raise SelectionError(
                f"{where}: layer {index}: token_scores has {sizes[0]} experts, "
                f"gate_scores {sizes[1]}"
            )
    layers = {
        index: LayerScores(len(token[index]), None, None, token[index], gate[index])
        for index in sorted(token)
    }
    return _some(layers, where)


def _some(layers: dict[int, LayerScores], where: str) -> dict[int, LayerScores]:
    if not layers:
        raise SelectionError(f"{where}: no layers in it")
    return layers


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SelectionError(f"{where}: missing, or not a JSON object")
    return value


def _known_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            raise SelectionError(f'{where}: unknown key "{key}"{nearest(key, known)}')


def _row(value: Any, experts: int, where: str) -> list[float]:
    if not isinstance(value, list):
        raise SelectionError(f"{where}: missing, or not a list")
    if len(value) != experts or not value:
        raise SelectionError(f"{where}: {len(value)} scores for {experts} experts")
    return [_number(score, f"{where}: expert {expert}") for expert, score in enumerate(value)]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SelectionError(f"{where}: {value!r} is not a number")
    if not math.isfinite(value) or value < 0:
        raise SelectionError(f"{where}: {value} is not a finite number of at least 0")
    return float(value)


def _count(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SelectionError(f"{where}: {value!r} is not a whole number of at least 1")
    return value

"""Relevance scores: how much a task uses each routed expert of each layer.

The file format `esft-scores/1` is described in docs/scores-format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from esft.errors import SelectionError
from esft.files import read_json, write_json
from esft.layer_scores import LayerScores, count, known_keys, mapping, number, score_row

FORMAT = "esft-scores/1"

# What the scores say of the model they were taken on; None where it is not known.
MODEL_TEXTS = ("name", "model_type", "architecture")
MODEL_SIZES = ("parameters", "routed_parameters", "expert_parameters", "bytes_per_parameter")
UNKNOWN_MODEL: dict[str, Any] = dict.fromkeys((*MODEL_TEXTS, *MODEL_SIZES))

_KEYS = ("format", "model", "sample", "layers", "stability")
_OFFICIAL = {"token": "token_scores", "gate": "gate_scores"}


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
            "layers": {str(index): layer.to_dict() for index, layer in sorted(self.layers.items())},
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
        content = read_json(Path(path), "scores file", SelectionError)
        return cls.from_dict(content, where=str(path))

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
        known_keys(value, _KEYS, where)
        return cls(
            layers=_own_layers(mapping(value.get("layers"), f"{where}: layers"), where),
            model=_model(mapping(value.get("model", {}), f"{where}: model"), where),
            sample=dict(mapping(value.get("sample", {}), f"{where}: sample")),
            stability={
                name: number(share, f"{where}: stability: {name}")
                for name, share in mapping(
                    value.get("stability", {}), f"{where}: stability"
                ).items()
            },
        )


def read_model(value: Any, where: str) -> dict[str, Any]:
    """Check what a scores or selection file says of its model; absent facts become None.

    Raises:
        SelectionError: a fact has the wrong type; the message starts with `where`.
    """
    return _model(mapping(value, f"{where}: model"), where)


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
        count(value.get(key), f"{where}: model: {key}")
    return {**UNKNOWN_MODEL, **value}


def _own_layers(value: Mapping[str, Any], where: str) -> dict[int, LayerScores]:
    layers = {}
    for key, item in value.items():
        index = layer_index(key, f"{where}: layers")
        layers[index] = LayerScores.from_dict(item, f"{where}: layer {index}")
    return _some(layers, where)


def _official_layers(value: Mapping[str, Any], where: str) -> dict[int, LayerScores]:
    tables: dict[str, dict[int, list[float]]] = {}
    for metric, name in _OFFICIAL.items():
        tables[metric] = {}
        for key, item in mapping(value.get(name), f"{where}: {name}").items():
            index = layer_index(key, f"{where}: {name}")
            place = f"{where}: {name}: layer {index}"
            scores = mapping(item, place)
            if set(scores) != {str(expert) for expert in range(len(scores))}:
                raise SelectionError(
                    f"{place}: expected the experts 0 to {len(scores) - 1}, each once"
                )
            row = [scores[str(expert)] for expert in range(len(scores))]
            tables[metric][index] = score_row(row, len(row), place)
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

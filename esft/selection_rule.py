"""The rule that turns scores into a selection: its options, checked, and their defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from esft.errors import SelectionError, nearest
from esft.layer_scores import METRICS

DEFAULT_P = 0.2
AUTO = "auto"
GROUPS = (2, 4)
MASSES = ("share", "raw")
POOLS = ("all", "unselected")

# `official-token` gives the released configurations exactly. `official-gate` is the paper's rule:
# its p of 0.1 is of the raw gate mass, which is 0.29 to 0.51 a layer on DeepSeek-V2-Lite.
PRESETS: dict[str, dict[str, Any]] = {
    "official-token": {"metric": "token", "p": 0.2, "mass": "raw", "round": 4},
    "official-gate": {"metric": "gate", "p": 0.1, "mass": "raw"},
}

_BUDGET = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*(%|[kMGT]?i?B)?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


@dataclass(frozen=True)
class Budget:
    """How much may be trained, in one of three units.

    Attributes:
        amount: a fraction of the model's parameters, a number of parameters, or bytes.
        unit: `share`, `parameters` or `bytes`.
        text: as the user wrote it.
    """

    amount: Fraction
    unit: str
    text: str


@dataclass(frozen=True)
class Rule:
    """A checked rule; exactly one of `p`, `cover`, `top_n` and `budget` is set.

    `cover` means that p is found rather than given, see `esft.stability.choose_p`.
    """

    metric: str
    mass: str
    p: float | None
    cover: float | None
    round: int | None
    top_n: int | None
    budget: Budget | None
    group: int | None
    layers: str | None
    random: int | None
    random_from: str | None
    preset: str | None

    def to_dict(self, pool: str | None) -> dict[str, Any]:
        """Return what a selection file says of its rule.

        Args:
            pool: the tokens that the scores were averaged over: `all`, `prompt`, `completion`, or
                None where unknown.
        """
        rule: dict[str, Any] = {"metric": self.metric, "pool": pool, "round": self.round}
        if self.p is not None or self.cover is not None:
            rule |= {"mass": self.mass, "p": AUTO if self.p is None else self.p}
        optional = {
            "top_n": self.top_n,
            "budget": self.budget.text if self.budget else None,
            "group": self.group,
            "layers": self.layers,
            "random": self.random,
            "random_from": self.random_from,
            "preset": self.preset,
        }
        return rule | {name: value for name, value in optional.items() if value is not None}


def make_rule(
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
) -> Rule:
    """Check the options of `select`, apply a preset, and fill in the defaults.

    Raises:
        SelectionError: a value is out of range, or two options contradict; both are named.
    """
    given = {"metric": metric, "p": p, "mass": mass, "round": round}
    values = {name: value for name, value in given.items() if value is not None}
    if preset is not None:
        others = {"--top-n": top_n, "--budget": budget, "--group": group}
        values |= _preset(preset, values, others)
    ways: dict[str, Any] = {"--p": values.get("p"), "--top-n": top_n, "--budget": budget}
    named = [option for option, value in ways.items() if value is not None]
    if len(named) > 1:
        raise SelectionError(f"{named[0]} and {named[1]} contradict each other; give one of them")
    if not named:
        values["p"] = DEFAULT_P
    elif named[0] != "--p" and "mass" in values:
        raise SelectionError(f"--mass says what --p is a part of; it contradicts {named[0]}")
    if group is not None and "p" not in values:
        raise SelectionError(f"--group goes with --p; it contradicts {named[0]}")
    mass = _choice("--mass", values.get("mass", MASSES[0]), MASSES)
    auto = values.get("p") == AUTO
    if auto and mass != MASSES[0]:
        raise SelectionError(f"--p auto is a share; it contradicts --mass {mass}")
    if cover is not None and not auto:
        raise SelectionError("--cover says what --p auto must reach; give --p auto too")
    if random_from is not None and random is None:
        raise SelectionError("--random-from says what --random draws from; give --random too")
    return Rule(
        metric=_choice("--metric", values.get("metric", METRICS[0]), METRICS),
        mass=mass,
        p=None if auto else _part("--p", values.get("p")),
        cover=_part("--cover", DEFAULT_P if cover is None else cover) if auto else None,
        round=_whole("--round", values.get("round"), 0, 15),
        top_n=_whole("--top-n", top_n, 1),
        budget=None if budget is None else parse_budget(budget),
        group=_group(group),
        layers=_layers_text(layers),
        random=_whole("--random", random, 0),
        random_from=None if random_from is None else _choice("--random-from", random_from, POOLS),
        preset=preset,
    )


def parse_budget(value: str | int) -> Budget:
    """Read a budget: `5%` of the model's parameters, `500MB` or `2GiB` of delta, or parameters.

    Raises:
        SelectionError: it is none of these, or not above 0, or above 100 %.
    """
    text = str(value).strip()
    match = _BUDGET.fullmatch(text)
    if isinstance(value, bool) or not match:
        raise SelectionError(
            f"--budget {text}: expected a share of the model (5%), bytes of the delta (500MB) or "
            f"a number of parameters (1_000_000)"
        )
    number, unit = Fraction(re.sub("[_,]", "", match[1])), match[2] or ""
    if number <= 0 or (unit == "%" and number > 100):
        raise SelectionError(f"--budget {text}: must be above 0 and at most 100%")
    if unit == "%":
        return Budget(number / 100, "share", text)
    if not unit:
        return Budget(number, "parameters", text)
    if "i" in unit:
        return Budget(number * _BINARY_UNITS.get(unit[0], 1), "bytes", text)
    return Budget(number * _UNITS[unit[:-1]], "bytes", text)


def choose_layers(text: str | None, present: Iterable[int]) -> list[int]:
    """Return the MoE layers that a list of layers and ranges, both ends included, names.

    Args:
        text: such as `3-20,22`; None means all.
        present: the layers that have scores.

    Raises:
        SelectionError: the text cannot be read, or a part of it names no MoE layer.
    """
    known = sorted(present)
    if text is None:
        return known
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise SelectionError(f"--layers {text}: expected layers and ranges such as 3-20,22")
        first, last = int(match[1]), int(match[2] or match[1])
        found = [layer for layer in known if first <= layer <= last]
        if not found:
            raise SelectionError(
                f"--layers {text}: no MoE layer in {part.strip()}; "
                f"the scores have layers {known[0]} to {known[-1]}"
            )
        chosen.update(found)
    return sorted(chosen)


def _preset(name: str, values: dict[str, Any], ways: dict[str, Any]) -> dict[str, Any]:
    if name not in PRESETS:
        close = nearest(name, PRESETS) or f"; choose one of {', '.join(PRESETS)}"
        raise SelectionError(f'--preset: unknown preset "{name}"{close}')
    preset = PRESETS[name]
    for key, value in values.items():
        if preset.get(key) != value:
            fixed = f"has {key} {preset[key]}" if key in preset else f"sets no {key}"
            raise SelectionError(f"--{key} {value} contradicts --preset {name}, which {fixed}")
    for option, value in ways.items():
        if value is not None:
            raise SelectionError(
                f"{option} {value} contradicts --preset {name}, which has p {preset['p']}"
            )
    return preset


def _choice(option: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise SelectionError(f'{option} "{value}": choose {" or ".join(known)}')
    return str(value)


def _part(option: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SelectionError(f"{option} must be above 0 and at most 1 (it is {value})")
    return float(value)


def _group(value: Any) -> int | None:
    if value is not None and value not in GROUPS:
        raise SelectionError(f"--group {value}: choose {' or '.join(map(str, GROUPS))}")
    return value


def _whole(option: str, value: Any, lowest: int, highest: int | None = None) -> int | None:
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < lowest or (highest is not None and value > highest):
        limit = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise SelectionError(f"{option} must be a whole number, {limit} (it is {value})")
    return int(value)


def _layers_text(layers: str | int | Iterable[int] | None) -> str | None:
    if layers is None or isinstance(layers, str):
        return layers
    if isinstance(layers, int):
        return str(layers)
    return ",".join(str(layer) for layer in layers)

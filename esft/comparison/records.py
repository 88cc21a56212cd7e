"""What a comparison measured: one record a run, and all of them together as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from esft.errors import DataError
from esft.files import read_json, write_json
from esft.measures.interval import Interval

FORMAT = "esft-comparison/1"
FILE = "comparison.json"


@dataclass(frozen=True)
class Point:
    """One evaluation while a run trained.

    Attributes:
        step: optimizer steps done; 0 is the base.
        seconds: of training until then, evaluations not counted.
        scores: of the validation rows, by metric; higher is better.
        loss: on the validation rows, in nats a token.
        general: held-out loss by domain, in nats a token; lower is better.
    """

    step: int
    seconds: float
    scores: dict[str, float]
    loss: float
    general: dict[str, float]

    @property
    def general_loss(self) -> float:
        """Mean held-out loss over the domains, in nats a token."""
        return sum(self.general.values()) / len(self.general)


@dataclass(frozen=True)
class Outcome:
    """What a run that ended came to.

    Attributes:
        scores: of the test rows, by metric; higher is better.
        loss: on the test rows, in nats a token.
        general: held-out loss by domain, in nats a token.
        trained: parameters that train.
        total: parameters of the model.
        delta_bytes: of the weights that the run saved.
        steps: optimizer steps done.
        seconds: of training, evaluations not counted.
        step_seconds: median over the steps, in seconds.
        tokens_per_second: of training.
        peak_memory: bytes.
        flops: of training, by formula (`esft.run.flops`); None where there is none for it.
        selection: layer -> experts that trained, best first; None where none were selected.
        drift: how the selected experts' share of the gate scores changed; `Drift.to_dict`.
    """

    scores: dict[str, Interval]
    loss: float
    general: dict[str, float]
    trained: int
    total: int
    delta_bytes: int
    steps: int
    seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_memory: int
    flops: float | None
    selection: dict[int, list[int]] | None = None
    drift: dict[str, Any] | None = None

    @property
    def general_loss(self) -> float:
        """Mean held-out loss over the domains, in nats a token."""
        return sum(self.general.values()) / len(self.general)


@dataclass(frozen=True)
class RunRecord:
    """One run of a comparison.

    Attributes:
        task: name of the task.
        method: the method's name in the comparison, such as `esft-token`.
        learning_rate: of this run.
        seed: of this run.
        folder: the run's, relative to the comparison's.
        sweep: the swept key and its value here, such as `{"p": 0.1}`; empty outside of sweeps.
        chosen: whether the learning rate is the one that the validation rows chose for the method.
        points: evaluations in the order of steps.
        outcome: None if the run failed or has not ended.
        error: why it failed.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    folder: str
    sweep: dict[str, float] = field(default_factory=dict)
    chosen: bool = False
    points: list[Point] = field(default_factory=list)
    outcome: Outcome | None = None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        model: as in the recipe.
        tasks: names, in the recipe's order; methods and seeds likewise.
        metric: name of the task's metric, which learning rates are chosen by.
        base: task -> the untrained model on its test rows, as the point of step 0.
        records: of all runs, in the order in which they were planned.
        recipe: the recipe with its `compare` section, JSON-ready.
        versions: library -> version, and the machine, as text.
    """

    model: str
    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    metric: str
    base: dict[str, Point]
    records: list[RunRecord]
    recipe: dict[str, Any]
    versions: dict[str, str]

    def of(self, task: str, method: str) -> list[RunRecord]:
        """Return the runs that count for a table: ended, chosen, outside of sweeps; by seed."""
        found = [
            record
            for record in self.records
            if (record.task, record.method) == (task, method)
            and record.chosen
            and record.outcome is not None
            and not record.sweep
        ]
        return sorted(found, key=lambda record: self.seeds.index(record.seed))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description; `comparison.json` has it."""
        return {"format": FORMAT, **asdict(self)}

    def write(self, folder: Path) -> Path:
        """Write `comparison.json` into the comparison's folder, atomically."""
        write_json(folder / FILE, self.to_dict())
        return folder / FILE


def read_comparison(path: str | Path) -> Comparison:
    """Read a comparison from its folder or its file.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    value = read_json(file)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{file}: not a comparison ({FORMAT})")
    try:
        given = {key: item for key, item in value.items() if key != "format"}
        base = {task: Point(**point) for task, point in given.pop("base").items()}
        records = [_record(item) for item in given.pop("records")]
        return Comparison(base=base, records=records, **given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file}: damaged ({type(error).__name__}: {error})") from None


def _record(value: Mapping[str, Any]) -> RunRecord:
    outcome = value["outcome"]
    if outcome is not None:
        scores = {name: Interval(**score) for name, score in outcome["scores"].items()}
        selection = outcome["selection"]
        if selection is not None:  # JSON has no numbers for keys
            selection = {int(layer): ids for layer, ids in selection.items()}
        outcome = Outcome(**{**outcome, "scores": scores, "selection": selection})
    points = [Point(**point) for point in value["points"]]
    return RunRecord(**{**value, "points": points, "outcome": outcome})

"""From a run's folder to its record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esft.comparison.records import Interval, Outcome, Point, RunRecord
from esft.comparison.runs import PlannedRun
from esft.errors import DataError, EsftError
from esft.files import read_json
from esft.run.folder import METRICS, RESULT, SELECTION
from esft.selection import Selection

_GENERAL, _LOSS = "eval_general_", "_loss"


def record(run: PlannedRun, out: Path) -> RunRecord:
    """Return what is known of a planned run.

    Args:
        run: the run.
        out: the comparison's folder.

    Raises:
        EsftError: the run's files are damaged.
    """
    known = RunRecord(
        task=run.task,
        method=run.method,
        learning_rate=run.learning_rate,
        seed=run.seed,
        folder=run.folder,
        sweep=dict(run.sweep),
    )
    folder = out / run.folder
    failure = failure_file(folder)
    if failure.is_file():
        return replace(known, error=str(read_json(failure)["error"]))
    if not (folder / RESULT).is_file():
        return known
    return replace(known, points=_points(run, folder), outcome=_outcome(folder))


def failure_file(folder: Path) -> Path:
    """Return the file beside a run's folder that says why it failed."""
    return folder.with_name(f"{folder.name}.failed.json")


def log_file(folder: Path) -> Path:
    """Return the file beside a run's folder that has what it printed."""
    return folder.with_name(f"{folder.name}.log")


def _points(run: PlannedRun, folder: Path) -> list[Point]:
    points = []
    for number, line in enumerate((folder / METRICS).read_text("utf-8").splitlines(), start=1):
        try:
            logged = json.loads(line)
            if "eval_loss" in logged:
                points.append(_point(logged, run.recipe.evaluation.metrics))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / METRICS}:{number}: damaged ({error!r})") from None
    return points


def _point(logged: Mapping[str, Any], metrics: Sequence[str]) -> Point:
    general = {
        key.removeprefix(_GENERAL).removesuffix(_LOSS): value
        for key, value in logged.items()
        if key.startswith(_GENERAL) and key.endswith(_LOSS)
    }
    return Point(
        step=logged["step"],
        seconds=logged["train_seconds"],
        scores={name: logged[f"eval_{name}"] for name in metrics},
        loss=logged["eval_loss"],
        general=general,
    )


def _outcome(folder: Path) -> Outcome:
    found = read_json(folder / RESULT)
    selection = folder / SELECTION
    try:
        test = found["test"]
        return Outcome(
            scores={name: Interval(**score) for name, score in test["scores"].items()},
            loss=test["loss"],
            general=found["general"] or {},
            trained=found["trained"],
            total=found["total"],
            delta_bytes=found["delta_bytes"],
            steps=found["steps"],
            seconds=found["seconds"],
            step_seconds=found["step_seconds"],
            tokens_per_second=found["tokens_per_second"],
            peak_memory=found["peak_memory"],
            flops=found.get("flops"),
            selection=Selection.read(selection).experts if selection.is_file() else None,
            drift=found["drift"],
        )
    except (KeyError, TypeError) as error:
        raise EsftError(f"{folder / RESULT}: not the result of a run ({error!r})") from None

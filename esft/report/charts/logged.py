"""What a run's `metrics.jsonl` says step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

from esft.comparison.records import Comparison
from esft.errors import DataError
from esft.run.folder import METRICS


def logged(folder: Path, key: str) -> dict[int, float]:
    """Return what a run logged under a key, by step; empty if it has logged nothing.

    A step that was logged twice, because the run was killed and resumed, has its last value.
    Numbers that are not finite are left out.

    Args:
        folder: the run's.
        key: such as `loss`.

    Raises:
        DataError: a line is damaged; the message names it.
    """
    file = folder / METRICS
    if not file.is_file():
        return {}
    found = {}
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            said = json.loads(line)
            step, value = said["step"], said.get(key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break  # a run that was killed, or is still writing
            raise DataError(f"{file}:{number}: damaged ({error!r})") from None
        if isinstance(value, int | float) and math.isfinite(value):
            found[int(step)] = float(value)
    return dict(sorted(found.items()))


def training_losses(comparison: Comparison, folder: Path) -> dict[str, dict[int, float]]:
    """Return the training losses of the runs that count, by their folder and step.

    Args:
        comparison: has the runs.
        folder: the comparison's.

    Raises:
        DataError: a log is damaged.
    """
    return {
        run.folder: logged(folder / run.folder, "loss")
        for task in comparison.tasks
        for method in comparison.methods
        for run in comparison.of(task, method)
    }

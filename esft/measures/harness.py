"""EleutherAI's lm-evaluation-harness (arXiv 2405.14782) on a model that esft has loaded.

Its package, lm-eval, is an optional extra. Tasks are its own, or YAML files of yours; with local
data files nothing needs a network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esft.errors import DataError, EsftError, nearest
from esft.inference import load
from esft.locating import first_line
from esft.profiling import context_length

_LONGEST = 32_768  # tokens of a prompt, where the model could take more
_INSTALL = "pip install 'esft[harness]' (lm-eval)"


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        task: its name, or that of a group.
        metric: such as `acc`, with the filter behind a comma if there is one.
        value: as the harness gives it; None if that is infinite or not a number.
        error: its standard error, if the harness gives one.
        higher_is_better: if the task says so.
    """

    task: str
    metric: str
    value: float | None
    error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessScores:
    """What the harness found.

    Attributes:
        harness: its version.
        scores: by task, then by metric.
        rows: task -> how many rows were scored; groups have none of their own.
        shots: task -> how many examples stand before each row.
    """

    harness: str
    scores: tuple[HarnessScore, ...]
    rows: dict[str, int]
    shots: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)


def evaluate_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    path: str | Path | None = None,
    delta: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = 4096,
    max_rows: int | None = None,
) -> HarnessScores:
    """Score a model on tasks of the lm-evaluation-harness.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        tasks: names of tasks, groups or tags, patterns of them, or YAML files.
        path: a folder with task files of yours; a `!function` in them runs code.
        delta: folder of a delta made from this model.
        device: see `esft.loading.pick_device`.
        dtype: see `esft.loading.pick_dtype`.
        batch_tokens: rows are scored so many at a time that, each as long as the model's context,
            they have at most as many tokens; at least one.
        max_rows: score only the first rows of each task.

    Raises:
        EsftError: lm-eval is not installed, or a number is out of its range.
        DataError: there is no such task, or its data cannot be had.
        ModelError, DeltaError, CheckError: as `esft.inference.load`.
    """
    for name, number in (("--batch-tokens", batch_tokens), ("--max-rows", max_rows)):
        if number is not None and number < 1:
            raise EsftError(f"{name} {number}: expected at least 1")
    if find_spec("lm_eval") is None:
        raise EsftError(f"--harness: lm-eval is not installed; {_INSTALL}")
    with _quiet():
        manager, names = _find(tasks, path)
    loaded, tokenizer = load(model, delta=delta, device=device, dtype=dtype)
    with _quiet():
        length = context_length(loaded, _LONGEST)
        adapter = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=loaded,
            tokenizer=tokenizer,
            max_length=length,
            batch_size=max(1, batch_tokens // length),
        )
        try:
            found = import_module("lm_eval").simple_evaluate(
                adapter, tasks=names, task_manager=manager, limit=max_rows, log_samples=False
            )
        except Exception as error:  # code that a task wants to run, a prompt that is too long
            raise EsftError(f"--harness {','.join(names)}: {first_line(error)}") from error
    return HarnessScores(
        harness=version("lm-eval"),
        scores=tuple(_scores(found)),
        rows={task: count["effective"] for task, count in found["n-samples"].items()},
        shots={
            task: shots for task, shots in found["n-shot"].items() if task in found["n-samples"]
        },
    )


def _find(tasks: Sequence[str], path: str | Path | None) -> tuple[Any, list[str]]:
    """Return who knows the tasks, and their names.

    Raises:
        DataError: a task is not known, or its data cannot be had.
    """
    if path is not None and not Path(path).is_dir():
        raise DataError(f"--harness-path {path}: no such folder")
    manager: Any = None
    missing: list[str] = []
    # The harness' own tasks are thousands of files, which are read only if they are wanted.
    for own in (False, True) if path is not None else (True,):
        manager = import_module("lm_eval.tasks").TaskManager(
            include_path=None if path is None else str(path), include_defaults=own
        )
        missing = [task for task in tasks if not _matches(manager, task)]
        if not missing:
            break
    if missing:
        where = "" if path is None else f" or in {path}"
        raise DataError(
            f"--harness: lm-eval knows no task {missing[0]}{where}"
            f"{nearest(missing[0], manager.all_tasks)}"
        )
    names = list(dict.fromkeys(name for task in tasks for name in _matches(manager, task)))
    # Here, before the model is loaded, and not again.
    loaded = _load(manager, names)
    manager.load = lambda _: loaded
    return manager, names


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except Exception as error:  # of datasets, of the hub, of a file, of YAML
        raise DataError(
            f"--harness {','.join(names)}: cannot load the task's data: {type(error).__name__}: "
            f"{first_line(error)}; without network give tasks whose data are local files "
            f"(dataset_path: json, dataset_kwargs: {{data_files: ...}})"
        ) from error


def _matches(manager: Any, task: str) -> list[str]:
    return [task] if Path(task).is_file() else list(manager.match_tasks([task]))


def _scores(found: dict[str, Any]) -> Iterator[HarnessScore]:
    """Yield the figures of the harness' results, whose keys are `metric,filter`."""
    for task, figures in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or not chosen or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            yield HarnessScore(
                task=task,
                metric=metric if chosen == "none" else key,
                value=_finite(value),
                error=_finite(error),
                higher_is_better=better.get(metric),
            )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness' bars, prints and log lines to itself; errors come as exceptions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(level)

"""What a worker is asked to do: train a run, or score the untrained model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from esft.comparison.base import score_base
from esft.files import write_json
from esft.locating import trusting_remote_code
from esft.progress import ConsoleReporter
from esft.recipe import read_recipe
from esft.recipe_sections import Recipe
from esft.training import train


def run_job(job: Mapping[str, Any]) -> None:
    """Do a job.

    Args:
        job: `kind`, `train` or `base`; `recipe`, a file; `out`, the run's folder, or the file for
            the base's scores; `resume`; `trust`, whether a checkpoint's own code may run.
    """
    reporter = ConsoleReporter(Console(file=sys.stderr, width=120))
    recipe, out = read_recipe(job["recipe"]), Path(job["out"])
    if job["trust"]:
        with trusting_remote_code():
            _run(job, recipe, out, reporter)
    else:
        _run(job, recipe, out, reporter)


def _run(job: Mapping[str, Any], recipe: Recipe, out: Path, reporter: ConsoleReporter) -> None:
    if job["kind"] == "base":
        write_json(out, asdict(score_base(recipe, reporter=reporter)))
    else:
        train(recipe, out, resume=job["resume"], reporter=reporter)

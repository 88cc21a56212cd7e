"""Several methods, one recipe -> what each costs and gives, and whether chance would do."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esft import processes
from esft.comparison.gathering import failure_file, log_file, record
from esft.comparison.learning_rates import choose_learning_rate
from esft.comparison.pool import Pool
from esft.comparison.records import Comparison, Point, RunRecord
from esft.comparison.runs import PlannedRun, Planner
from esft.comparison.spec import CompareRecipe, as_compare_recipe
from esft.errors import EsftError
from esft.files import read_json, refuse_existing, remove_folder, write_json, write_text
from esft.locating import resolve, trusted
from esft.manifest import versions
from esft.progress import SILENT, Reporter
from esft.recipe import read_recipe
from esft.recipe_sections import Recipe
from esft.recipe_text import to_yaml
from esft.run import lock
from esft.run.folder import CHECKPOINTS, DELTA, RECIPE, RESULT
from esft.run.guard import differences, recipe_identity
from esft.run.interruption import Interrupted, interruptible
from esft.run.processes import once
from esft.run.task_data import data_identity, general_identity

COMPARE, BASE, INPUTS = "compare.yaml", "base", "inputs.json"


def compare(
    recipe: CompareRecipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Train a task by several methods and gather what each costs and gives.

    Every run is an ordinary run folder in `out`. One that has ended is not trained again when the
    comparison is started once more, so an interrupted comparison goes on where it was, and methods,
    seeds and sweeps can be added later. A run that fails does not stop the others.

    Args:
        recipe: a recipe, with a `compare` section; its keys as a mapping, or a YAML file.
        out: the comparison's folder; new, empty, or that of the same comparison.
        jobs: runs at a time.
        reporter: told of each run that ends.

    Returns:
        the comparison, also written as `comparison.json`.

    Raises:
        RecipeError, DataError, ModelError: the input is at fault; nothing is written.
        OutputError: `out` has something else in it.
        EsftError: `out` has runs of another recipe, or of other data.
        Interrupted: a signal came; what has ended is there.
    """
    if jobs < 1:
        raise EsftError(f"--jobs {jobs}: expected at least 1")
    if processes.count() > 1:
        raise once(
            EsftError(
                "esft compare starts its runs in processes of its own, one a GPU; start it by "
                "itself, without a launcher"
            )
        )
    if not isinstance(recipe, CompareRecipe):
        recipe = as_compare_recipe(recipe)
    out = Path(out)
    with interruptible(), lock.hold(out):
        try:
            return _Compared(recipe, out, jobs, reporter).run()
        except Interrupted as interrupted:
            interrupted.message = (
                f"{interrupted}; to go on: esft compare {out / COMPARE} --out {out}"
                if (out / COMPARE).exists()
                else f"{interrupted}; nothing was written yet"
            )
            reporter.note(str(interrupted))
            raise


class _Compared:
    """One comparison: what is planned, and what has been done of it."""

    def __init__(self, recipe: CompareRecipe, out: Path, jobs: int, reporter: Reporter) -> None:
        self.recipe, self.out, self.jobs, self.reporter = recipe, out, jobs, reporter
        self.planner = Planner(recipe)
        resolve(recipe.base["model"])  # or fail before anything is written
        self.first = {
            task: self.planner.grid(task, self.planner.methods[0])[0].recipe
            for task in self.planner.tasks
        }
        inputs = {
            task: data_identity(first.data) | {"general": general_identity(first.evaluation)}
            for task, first in self.first.items()
        }
        self._check_folder(inputs)
        write_text(out / COMPARE, to_yaml(recipe.to_dict()))
        write_json(out / INPUTS, inputs)
        self.records: dict[str, RunRecord] = {}
        self.base: dict[str, Point] = {}
        self.chosen: dict[tuple[str, str], float] = {}

    def run(self) -> Comparison:
        """Do what is left to do. See the module's `compare`."""
        planner = self.planner
        methods = [(task, method) for task in planner.tasks for method in planner.methods]
        with Pool(self.jobs, torch.cuda.device_count()) as pool:
            self._score_base(pool)
            self._train(pool, [run for pair in methods for run in planner.grid(*pair)])
            for pair in methods:
                self._choose(*pair)
            self._train(
                pool,
                [
                    planner.run(task, method, self.chosen[task, method], seed)
                    for seed in planner.seeds[1:]
                    for task, method in methods
                    if (task, method) in self.chosen
                ],
            )
            self._train(pool, planner.sweeps(self.chosen))
        if self.recipe.spec.keep_deltas == "none":
            for each in self.records.values():
                self._drop_delta(each)
        return self._comparison()

    def _check_folder(self, inputs: Mapping[str, Any]) -> None:
        """Check that what is in the folder is of this comparison."""
        if not (self.out / COMPARE).exists():
            refuse_existing(self.out, but_for={lock.LOCK})
            return
        known = read_json(self.out / INPUTS) if (self.out / INPUTS).exists() else {}
        for task in known.keys() & inputs.keys():
            changed = differences(known[task], inputs[task])
            if changed:
                raise EsftError(
                    f"{self.out}: the data of task {task} have changed since:\n"
                    + "\n".join(changed)
                    + "\nchoose another --out"
                )

    def _score_base(self, pool: Pool) -> None:
        """Score the untrained model on each task's test rows."""
        jobs, files = [], []
        for task, recipe in self.first.items():
            file = self.out / BASE / f"{task}.json"
            files.append(file)
            if not file.exists():
                jobs.append(self._job("base", recipe, file))
        for place, code in pool.run(jobs):
            if code:
                raise EsftError(f"scoring the base failed: {self._why(jobs[place], code)}")
        self.base = {
            task: Point(**read_json(file)) for task, file in zip(self.first, files, strict=True)
        }

    def _train(self, pool: Pool, runs: Sequence[PlannedRun]) -> None:
        """Train what has not been trained, and gather what all of it came to."""
        todo = []
        for run in runs:
            if self._is_done(run):
                self.records[run.folder] = record(run, self.out)
            else:
                self.records[run.folder] = RunRecord(
                    run.task, run.method, run.learning_rate, run.seed, run.folder, dict(run.sweep)
                )
                todo.append(run)
        if len(todo) < len(runs):
            self.reporter.note(f"{len(runs) - len(todo)} of {len(runs)} runs were there already")
        jobs = [self._train_job(run) for run in todo]
        with self.reporter.task("comparing", len(jobs), "run") as shown:
            for place, code in pool.run(jobs):
                run = todo[place]
                if code and not failure_file(self.out / run.folder).exists():
                    # It had no chance to say why.
                    write_json(
                        failure_file(self.out / run.folder),
                        {"error": self._why(jobs[place], code), "log": jobs[place]["log"]},
                    )
                self.records[run.folder] = record(run, self.out)
                self._tell(run)
                shown.advance()
                self._comparison()

    def _is_done(self, run: PlannedRun) -> bool:
        """Say whether a run has ended; refuse a folder that another recipe made."""
        folder = self.out / run.folder
        if not (folder / RECIPE).exists():
            return False
        changed = differences(
            recipe_identity(read_recipe(folder / RECIPE)), recipe_identity(run.recipe)
        )
        if changed:
            raise EsftError(
                f"{folder}: was trained by another recipe:\n"
                + "\n".join(changed)
                + "\ndelete it to train it again, or choose another --out"
            )
        return (folder / RESULT).exists()

    def _train_job(self, run: PlannedRun) -> dict[str, Any]:
        folder = self.out / run.folder
        failure_file(folder).unlink(missing_ok=True)
        resume = (folder / CHECKPOINTS).is_dir() and not (folder / DELTA).exists()
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # what a kill left of it
        return self._job("train", run.recipe, folder, resume=resume)

    def _job(self, kind: str, recipe: Recipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
        """Return a job for the pool; its recipe and its log lie beside what it writes."""
        asked = out.with_name(f"{out.name}.yaml")
        asked.parent.mkdir(parents=True, exist_ok=True)
        write_text(asked, recipe.to_yaml())
        return {
            "kind": kind,
            "recipe": str(asked),
            "out": str(out),
            "resume": resume,
            "trust": trusted.get(),
            "log": str(log_file(out)),
            "failure": str(failure_file(out)),
        }

    def _why(self, job: Mapping[str, Any], code: int) -> str:
        failure = Path(job["failure"])
        if failure.exists():
            return str(read_json(failure)["error"])
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        memory = "; out of memory?" if code == -9 else ""
        return f"the process {how}{memory}; its log: {job['log']}"

    def _choose(self, task: str, method: str) -> None:
        """Choose a method's learning rate by the validation rows."""
        grid = [self.records[run.folder] for run in self.planner.grid(task, method)]
        ended = [each for each in grid if each.outcome is not None]
        if not ended:
            return
        rate = choose_learning_rate(ended, tolerance=self.recipe.spec.tolerance)
        self.chosen[task, method] = rate
        if len(grid) > 1:
            self.reporter.note(f"{task} {method}: learning rate {rate:g}")
        if self.recipe.spec.keep_deltas == "chosen":
            for each in ended:
                if each.learning_rate != rate:
                    self._drop_delta(each)

    def _drop_delta(self, each: RunRecord) -> None:
        remove_folder(self.out / each.folder / DELTA)

    def _tell(self, run: PlannedRun) -> None:
        found = self.records[run.folder]
        if found.outcome is None:
            self.reporter.note(f"{run.title}: FAILED: {found.error}")
            return
        metric, score = next(iter(found.outcome.scores.items()))
        general = (
            f", general loss {found.outcome.general_loss:.3f}" if found.outcome.general else ""
        )
        self.reporter.note(
            f"{run.title}: {metric} {score.value:.3f}{general}, {found.outcome.seconds:.0f} s"
        )

    def _comparison(self) -> Comparison:
        """Gather all records, write them down and return them."""
        records = [
            replace(each, chosen=self.chosen.get((each.task, each.method)) == each.learning_rate)
            for each in self.records.values()
        ]
        comparison = Comparison(
            model=self.recipe.base["model"],
            tasks=self.planner.tasks,
            methods=self.planner.methods,
            seeds=self.planner.seeds,
            metric=next(iter(self.first.values())).evaluation.metrics[0],
            base=self.base,
            records=records,
            recipe=self.recipe.to_dict(),
            versions=versions() | {"machine": f"{platform.machine()}, {platform.system()}"},
        )
        comparison.write(self.out)
        return comparison


def planned(
    recipe: CompareRecipe | Mapping[str, Any] | str | Path,
) -> dict[str, list[PlannedRun]]:
    """Return the runs of a comparison without running one, by what they are for.

    Returns:
        `grid`: those that choose learning rates; `seeds`: the others of the table, of which one
        learning rate each will be run; `sweep`.

    Raises:
        RecipeError: the recipe is wrong.
    """
    if not isinstance(recipe, CompareRecipe):
        recipe = as_compare_recipe(recipe)
    planner = Planner(recipe)
    methods = [(task, method) for task in planner.tasks for method in planner.methods]
    first = {pair: planner.rates(pair[1])[0] for pair in methods}
    return {
        "grid": [run for pair in methods for run in planner.grid(*pair)],
        "seeds": [
            planner.run(*pair, first[pair], seed) for seed in planner.seeds[1:] for pair in methods
        ],
        "sweep": planner.sweeps(first),
    }

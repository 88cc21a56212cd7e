"""The runs of a comparison: each an ordinary recipe and the folder that it is trained into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esft.comparison.methods import METHODS, method_keys, with_keys
from esft.comparison.spec import SECTION, CompareRecipe
from esft.comparison.sweep import applies, swept
from esft.errors import EsftError, RecipeError
from esft.recipe import make_recipe
from esft.recipe_sections import Recipe, SelectionSpec
from esft.run.fields import with_defaults

RUNS = "runs"


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        task: name of the task.
        method: name of the method in the comparison.
        learning_rate: of this run; seed likewise.
        recipe: the whole of it, every default filled in.
        folder: relative to the comparison's.
        sweep: the swept key and its value here; empty outside of sweeps.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    recipe: Recipe
    folder: str
    sweep: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name the run in a line."""
        swept_to = "".join(f" {key}={value:g}" for key, value in self.sweep.items())
        return f"{self.task} {self.method}{swept_to} lr {self.learning_rate:g} seed {self.seed}"


class Planner:
    """Turns a comparison's recipe into runs. Every run's recipe is checked when this is made.

    Args:
        recipe: the comparison's.

    Raises:
        RecipeError: a method, a task or a key is wrong.

    Attributes:
        tasks: names.
        methods: names.
        seeds: in order.
    """

    def __init__(self, recipe: CompareRecipe) -> None:
        self._recipe = recipe
        spec = recipe.spec
        self.seeds = list(spec.seeds)
        self._tasks = dict(spec.tasks) or {_task_name(recipe.base): {}}
        self.tasks = list(self._tasks)
        self._entries = spec.entries()
        self.methods = list(self._entries)
        self._keys = {name: self._method(name) for name in self.methods}
        for task in self.tasks:
            for method in self.methods:
                self.grid(task, method)
        self.sweeps({})

    def rates(self, method: str) -> list[float]:
        """Return the learning rates that a method is tried with, ascending."""
        own = self._entries[method].get("learning_rates")
        common = self._recipe.spec.learning_rates
        rates = own if own is not None else common
        if not rates:
            training = self._merged(self.tasks[0], method).get("training") or {}
            rates = [training["learning_rate"]] if "learning_rate" in training else []
        if not rates:
            raise RecipeError(
                f"{self._place('learning_rates')}: give the learning rates to try, such as "
                f"[1e-5, 3e-5, 1e-4], or training.learning_rate"
            )
        return sorted(rates)

    def grid(self, task: str, method: str) -> list[PlannedRun]:
        """Return the runs with the first seed that choose a method's learning rate."""
        return [self.run(task, method, rate, self.seeds[0]) for rate in self.rates(method)]

    def sweeps(self, chosen: Mapping[tuple[str, str], float]) -> list[PlannedRun]:
        """Return the runs of all sweeps.

        Args:
            chosen: (task, method) -> its learning rate; one that is missing is left out, but its
                recipes are checked.

        Raises:
            RecipeError: no method of the comparison has what is swept.
        """
        runs = []
        for key, values in self._recipe.spec.sweep.items():
            methods = [m for m in self.methods if applies(key, self._merged(self.tasks[0], m))]
            if not methods:
                raise RecipeError(
                    f"{self._place('sweep', key)}: no method of this comparison has it "
                    f"({', '.join(self.methods)})"
                )
            for task in self.tasks:
                for method in methods:
                    for value in values:
                        for seed in self.seeds:
                            rate = chosen.get((task, method), self.rates(method)[0])
                            run = self.run(task, method, rate, seed, {key: value})
                            if (task, method) in chosen:
                                runs.append(run)
        return runs

    def run(
        self,
        task: str,
        method: str,
        rate: float,
        seed: int,
        sweep: Mapping[str, float] | None = None,
    ) -> PlannedRun:
        """Return one run, its recipe checked.

        Raises:
            RecipeError: a key is wrong; the message names the method if it is one of its own.
        """
        keys = self._merged(task, method)
        for key, value in (sweep or {}).items():
            keys = swept(key, value, keys)
        training = {**(keys.get("training") or {}), "learning_rate": rate}
        training |= {"seed": seed, "data_seed": seed}
        keys = {**keys, "training": training}
        parts = [RUNS, task, method]
        parts += [f"{key}-{value:g}" for key, value in (sweep or {}).items()]
        parts += [f"lr-{rate:g}", f"seed-{seed}"]
        try:
            recipe = with_defaults(make_recipe(keys, places=self._recipe.places))
        except EsftError as error:
            raise RecipeError(f"method {method}, task {task}: {error}") from None
        _check_measured(recipe, task)
        recipe = _sampled(recipe, seed)
        return PlannedRun(task, method, rate, seed, recipe, str(Path(*parts)), dict(sweep or {}))

    def _method(self, name: str) -> list[Mapping[str, Any]]:
        """Return what is put over the base recipe for a method, in this order."""
        entry = self._entries[name]
        own = {key: value for key, value in entry.items() if key not in ("like", "learning_rates")}
        if name not in METHODS and "like" not in entry and "method" in entry:
            return [own]
        try:
            return [method_keys(entry.get("like", name)), own]
        except RecipeError as error:
            raise RecipeError(
                f"{self._place('methods')}: {error} (one of your own needs like: and a method's "
                f"name, or method:)"
            ) from None

    def _merged(self, task: str, method: str) -> dict[str, Any]:
        keys = with_keys(self._recipe.base, {"data": self._tasks[task]})
        for over in self._keys[method]:
            keys = with_keys(keys, over)
        return keys

    def _place(self, *key: str) -> str:
        return self._recipe.places.of((SECTION, *key))


def _sampled(recipe: Recipe, seed: int) -> Recipe:
    """Return a recipe whose rule, if it has one, draws its sample by a seed: all methods alike."""
    selects = recipe.selects_experts or recipe.matches_esft
    if not selects or isinstance(recipe.selection, str):
        return recipe
    rule = recipe.selection or SelectionSpec()
    return recipe.model_copy(update={"selection": rule.model_copy(update={"seed": seed})})


def _task_name(base: Mapping[str, Any]) -> str:
    """Name the only task after its training rows: the folder of a `train.jsonl`, or the file."""
    train = (base.get("data") or {}).get("train")
    if isinstance(train, Mapping):
        train = train.get("path")
    path = Path(train) if isinstance(train, str) else Path("task")
    return (path.parent.name if path.stem == "train" else path.stem) or "task"


def _check_measured(recipe: Recipe, task: str) -> None:
    """Check that a run is scored on rows that choose, and on others that judge."""
    if recipe.data.eval is None and recipe.data.eval_rows is None:
        raise RecipeError(
            f"task {task}: neither data.eval nor data.eval_rows is given: validation rows choose "
            f"the learning rates; data.eval_rows: 200 sets 200 training rows aside for it"
        )
    if recipe.data.test is None:
        raise RecipeError(
            f"task {task}: data.test is missing: the rows that methods are compared on; they must "
            f"not be those that chose the learning rates"
        )

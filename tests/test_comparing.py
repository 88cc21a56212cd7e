"""`esft compare`: real runs of a tiny random model, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import esft
from esft.comparing import planned
from esft.comparison.records import Comparison, RunRecord, read_comparison
from esft.errors import DataError, EsftError, OutputError, RecipeError
from tests.checkpoints import save_tiny
from tests.notes import Notes

RATES, SEEDS = [1e-3, 3e-2], [5, 9]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, training rows, test rows and two domains."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny(folder / "model", "qwen3_moe")
    _rows(folder / "train.jsonl", 0, 24)
    _rows(folder / "test.jsonl", 24, 32)
    (folder / "general").mkdir()
    _rows(folder / "general" / "odd.jsonl", 33, 36)
    _rows(folder / "general" / "even.jsonl", 40, 43)
    return folder


def _rows(path: Path, first: int, last: int) -> None:
    rows = [
        {"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(first, last)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(material: Path, **compare: Any) -> dict[str, Any]:
    return {
        "model": str(material / "model"),
        "selection": {"p": 0.3, "tokens": 64},
        "data": {
            "train": str(material / "train.jsonl"),
            "eval_rows": 6,
            "test": str(material / "test.jsonl"),
            "packing": False,
            "max_length": 32,
        },
        "evaluation": {"general": str(material / "general")},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
        },
        "compare": {
            "tasks": {"letters": {}},
            "methods": ["esft-token", "full"],
            "learning_rates": RATES,
            "seeds": SEEDS,
            **compare,
        },
    }


@pytest.fixture(scope="module")
def compared(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, esft.compare(recipe(material), out)


def by_method(found: Comparison, method: str) -> list[RunRecord]:
    return [each for each in found.records if each.method == method]


def test_every_rate_is_tried_with_the_first_seed_and_the_chosen_one_with_all(
    compared: tuple[Path, Comparison],
) -> None:
    _, found = compared
    for method in ("esft-token", "full"):
        runs = by_method(found, method)
        grid = [run for run in runs if run.seed == SEEDS[0]]
        assert [run.learning_rate for run in grid] == RATES

        def goodness(run: RunRecord) -> tuple[float, float]:
            return run.points[-1].scores["exact_match"], -run.points[-1].loss

        best = max(grid, key=goodness).learning_rate
        rest = [(run.learning_rate, run.seed) for run in runs if run.seed != SEEDS[0]]
        assert rest == [(best, SEEDS[1])]
        assert all(run.chosen == (run.learning_rate == best) for run in runs)
        assert len(found.of("letters", method)) == len(SEEDS)


def test_the_record_says_what_evaluating_the_delta_says(
    compared: tuple[Path, Comparison], material: Path
) -> None:
    out, found = compared
    run = found.of(found.tasks[0], "esft-token")[1]
    assert run.outcome is not None
    delta = out / run.folder / "delta"
    test = esft.evaluate(material / "model", material / "test.jsonl", delta=delta)
    assert run.outcome.loss == pytest.approx(test.loss, rel=1e-5)
    assert run.outcome.scores["exact_match"].value == test.exact_match
    for domain in ("odd", "even"):
        other = esft.evaluate(
            material / "model", material / "general" / f"{domain}.jsonl", delta=delta
        )
        assert run.outcome.general[domain] == pytest.approx(other.loss, rel=1e-5)
    assert run.outcome.general_loss == pytest.approx(sum(run.outcome.general.values()) / 2)
    weights = sum(file.stat().st_size for file in delta.glob("*.safetensors"))
    assert run.outcome.delta_bytes == weights


def test_only_deltas_of_chosen_rates_are_kept(compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    for run in found.records:
        assert (out / run.folder / "delta").is_dir() == run.chosen
        assert (out / run.folder / "result.json").is_file()


def test_no_delta_is_kept_where_none_is_wanted(material: Path, tmp_path: Path) -> None:
    asked = recipe(
        material, methods=["esft-token"], learning_rates=[1e-2], seeds=[0], keep_deltas="none"
    )
    (run,) = esft.compare(asked, tmp_path / "out").records
    assert run.outcome is not None
    assert run.outcome.delta_bytes > 0
    assert not (tmp_path / "out" / run.folder / "delta").exists()


def test_the_base_is_scored_without_any_delta(
    compared: tuple[Path, Comparison], material: Path
) -> None:
    _, found = compared
    test = esft.evaluate(material / "model", material / "test.jsonl")
    assert found.base[found.tasks[0]].loss == pytest.approx(test.loss, rel=1e-6)


def test_curves_begin_at_the_base_and_are_the_same_there(
    compared: tuple[Path, Comparison],
) -> None:
    _, found = compared
    starts = [run.points[0] for run in found.records]
    assert {point.step for point in starts} == {0}
    # All methods are scored on the same rows: the same training rows were set aside for each.
    assert max(point.loss for point in starts) - min(point.loss for point in starts) < 1e-6
    assert [point.step for point in found.records[0].points] == [0, 2, 4]


def test_it_is_read_back_as_it_was(compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    assert read_comparison(out) == found


def test_every_method_sees_the_same_rows_in_the_same_order(material: Path, tmp_path: Path) -> None:
    """With a rate that moves nothing, the loss of a step tells which rows were in it."""
    asked = recipe(
        material,
        methods=["esft-token", "random", "lora", "full"],
        learning_rates=[1e-30],
        seeds=[0, 1],
    )
    found = esft.compare(asked, tmp_path / "out", jobs=2)
    for seed in (0, 1):
        losses = []
        for method in found.methods:
            (run,) = [each for each in by_method(found, method) if each.seed == seed]
            log = (tmp_path / "out" / run.folder / "metrics.jsonl").read_text().splitlines()
            losses.append([line["loss"] for line in map(json.loads, log) if "loss" in line])
            assert len(set(losses[-1])) == 4
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], rel=1e-5)


def test_what_is_there_is_not_run_again(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    before, first = compared
    out = tmp_path / "out"
    shutil.copytree(before, out)
    gone = first.of(first.tasks[0], "full")[1].folder
    shutil.rmtree(out / gone)
    stamps = {file: file.stat().st_mtime_ns for file in out.glob("runs/**/result.json")}
    notes = Notes()
    again = esft.compare(recipe(material), out, reporter=notes)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert (out / gone / "result.json").exists()
    assert [(run.folder, run.chosen) for run in again.records] == [
        (run.folder, run.chosen) for run in first.records
    ]


def test_methods_and_seeds_can_be_added_later(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    before, first = compared
    out = tmp_path / "out"
    shutil.copytree(before, out)
    more = recipe(material, methods=["esft-token", "full", "random"], seeds=[*SEEDS, 11])
    found = esft.compare(more, out)
    known = {run.folder: run for run in first.records}
    assert all(known[run.folder] == run for run in found.records if run.folder in known)
    assert len(found.of(found.tasks[0], "random")) == 3
    assert len(found.of(found.tasks[0], "full")) == 3


def test_a_run_that_fails_is_reported_and_stops_nothing(material: Path, tmp_path: Path) -> None:
    methods = {
        "lora": {"lora": {"target_modules": ["nothing_like_this"]}},
        "esft-token": {},
    }
    asked = recipe(material, methods=methods, learning_rates=[1e-2], seeds=[0])
    notes = Notes()
    found = esft.compare(asked, tmp_path / "out", reporter=notes)
    (failed,) = by_method(found, "lora")
    assert failed.outcome is None
    assert "nothing_like_this" in str(failed.error)
    assert any("FAILED" in line and "nothing_like_this" in line for line in notes.notes)
    assert by_method(found, "esft-token")[0].outcome is not None
    assert found.of(found.tasks[0], "lora") == []
    assert read_comparison(tmp_path / "out") == found


def test_a_process_that_is_killed_is_a_failed_run_and_is_tried_again(
    material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = recipe(material, methods=["esft-token"], learning_rates=[1e-2], seeds=[0])
    asked["training"]["max_steps"] = 2000
    program = tmp_path / "program.py"
    program.write_text(
        f"import json, esft\nasked = json.loads({json.dumps(asked)!r})\n"
        f"esft.compare(asked, {str(out)!r})"
    )
    process = subprocess.Popen([sys.executable, str(program)], env=_environment())
    os.kill(_running(out), signal.SIGKILL)
    assert process.wait(60) == 0
    (failed,) = read_comparison(out).records
    assert "signal 9" in str(failed.error)
    assert "out of memory?" in str(failed.error)

    process = subprocess.Popen([sys.executable, str(program)], env=_environment())
    run = _running(out)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not _lives(run)
    # The same when nothing can be tidied up: who asked for the run is gone.
    process = subprocess.Popen([sys.executable, str(program)], env=_environment())
    run = _running(out)
    process.kill()
    process.wait()
    _wait(lambda: not _lives(run))


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def _running(out: Path) -> int:
    """Wait until a run of the comparison has its lock; return its process."""
    found: list[int] = []

    def there() -> bool:
        # A killed run leaves its lock behind.
        texts = [file.read_text() for file in out.glob("runs/**/.lock")]
        found[:] = [pid for text in texts if text and _lives(pid := json.loads(text)["pid"])]
        return bool(found)

    _wait(there)
    return found[0]


def _wait(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_another_recipe_is_refused_in_the_same_folder(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    other = recipe(material)
    other["training"]["max_steps"] = 5
    with pytest.raises(EsftError, match=r"another recipe(.|\n)*training.max_steps: 4 .* 5"):
        esft.compare(other, out)


def test_other_data_are_refused_in_the_same_folder(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    other = recipe(material)
    _rows(tmp_path / "train.jsonl", 1, 25)
    other["data"]["train"] = str(tmp_path / "train.jsonl")
    with pytest.raises(EsftError, match="the data of task letters have changed"):
        esft.compare(other, out)


def test_other_domains_are_refused_in_the_same_folder(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    shutil.copytree(material / "general", tmp_path / "general")
    other = recipe(material)
    _rows(tmp_path / "general" / "odd.jsonl", 50, 53)
    other["evaluation"]["general"] = str(tmp_path / "general")
    with pytest.raises(EsftError, match=r"data of task letters have changed(.|\n)*general"):
        esft.compare(other, out)


def test_every_method_that_selects_draws_its_sample_by_the_seed(material: Path) -> None:
    methods = ["esft-token", "random", "hot-lora", "lora-matched", "lora", "full"]
    asked = recipe(material, methods=methods)
    del asked["selection"]
    for run in planned(asked)["grid"] + planned(asked)["seeds"]:
        selection = run.recipe.selection
        assert not isinstance(selection, str)
        drawn = None if selection is None else selection.seed
        assert drawn == (None if run.method in ("lora", "full") else run.seed), run.title


def test_a_folder_with_something_else_in_it_is_left_alone(material: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(OutputError):
        esft.compare(recipe(material), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_sweep_trains_every_value_with_every_seed_at_the_chosen_rate(
    compared: tuple[Path, Comparison], material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    found = esft.compare(recipe(material, sweep={"top_n": [1, 3]}), out)
    swept = [run for run in found.records if run.sweep]
    assert {run.method for run in swept} == {"esft-token"}  # full has no experts to choose
    chosen = found.of(found.tasks[0], "esft-token")[0].learning_rate
    assert {run.learning_rate for run in swept} == {chosen}
    assert [(run.sweep["top_n"], run.seed) for run in swept] == [
        (value, seed) for value in (1, 3) for seed in SEEDS
    ]
    for run in swept:
        assert run.outcome is not None
        assert run.outcome.selection is not None
        sizes = {len(ids) for ids in run.outcome.selection.values()}
        assert sizes == {run.sweep["top_n"]}
    # They are no part of the table.
    assert len(found.of(found.tasks[0], "esft-token")) == len(SEEDS)


def test_what_is_swept_reaches_the_recipes_of_the_methods_that_have_it(material: Path) -> None:
    methods = ["esft-token", "random", "lora", "lora-matched", "hot-lora", "full", "all-experts"]
    values = {"p": [0.05, 0.4], "rank": [2, 16], "sample_tokens": [32, 64], "group": [2]}
    swept = planned(recipe(material, methods=methods, sweep=values, seeds=[0]))["sweep"]
    reached: dict[str, dict[str, list[Any]]] = {key: {} for key in values}
    for run in swept:
        ((key, value),) = run.sweep.items()
        selection, lora = run.recipe.selection, run.recipe.lora
        assert not isinstance(selection, str)
        found = {
            "p": selection and selection.p,
            "rank": lora and lora.r,
            "sample_tokens": selection and selection.tokens,
            "group": selection and selection.group,
        }[key]
        assert found == value
        reached[key].setdefault(run.method, []).append(value)
    selecting = ("esft-token", "random", "hot-lora")
    assert reached == {
        "p": {name: [0.05, 0.4] for name in selecting},
        "rank": {"lora": [2, 16], "hot-lora": [2, 16]},
        "sample_tokens": {name: [32, 64] for name in selecting},
        "group": {name: [2] for name in selecting},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["esft-tokn"]}, 'did you mean "esft-token'),
        ({"methods": ["full", "full"]}, "full is given twice"),
        ({"methods": ["../full"]}, "cannot be the name of a folder"),
        ({"methods": []}, "names no method"),
        ({"methods": {"mine": {"training": {"max_steps": 3}}}}, "like:"),
        ({"methods": {"full": {"lora": {"r": 4}}}}, "method full, task letters: lora"),
        ({"seeds": []}, "compare.seeds"),
        ({"seeds": [1, 1]}, "a value is given twice"),
        ({"learning_rates": [0.0]}, "compare.learning_rates"),
        ({"learning_rates": []}, "give the learning rates to try"),
        ({"sweeep": {}}, 'did you mean "sweep'),
        ({"sweep": {"P": [0.1]}}, "cannot be swept; there are p, rank"),
        ({"sweep": {"p": []}}, "give one or more values"),
        ({"sweep": {"rank": [8]}}, "no method of this comparison has it"),
        ({"sweep": {"top_n": [1.5]}}, "whole numbers"),
        ({"tasks": {"a/b": {}}}, "cannot be the name of a folder"),
    ],
)
def test_a_wrong_section_is_refused_before_anything_is_written(
    material: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        esft.compare(recipe(material, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "message"), [("eval_rows", "data.eval_rows"), ("test", "data.test")]
)
def test_rows_that_choose_and_rows_that_judge_are_both_needed(
    material: Path, tmp_path: Path, missing: str, message: str
) -> None:
    asked = recipe(material)
    del asked["data"][missing]
    if missing == "eval_rows":
        for key in ("eval_strategy", "eval_steps", "eval_on_start"):
            del asked["training"][key]
    with pytest.raises(RecipeError, match=message):
        esft.compare(asked, tmp_path / "out")


def test_without_tasks_the_only_one_is_named_after_its_rows(material: Path) -> None:
    asked = recipe(material, tasks={})
    assert {run.task for run in planned(asked)["grid"]} == {material.name}
    asked["data"]["train"] = {"path": str(material / "test.jsonl")}
    assert {run.task for run in planned(asked)["grid"]} == {"test"}


def test_damage_is_told_from_a_comparison(tmp_path: Path) -> None:
    for text in ("{}", '{"format": "esft-comparison/1"}', "[]"):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(DataError, match="comparison"):
            read_comparison(tmp_path)

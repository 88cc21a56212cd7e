"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.errors import CheckError, EsftError, RecipeError
from esft.recipe import make_recipe
from esft.run import checkpoint
from esft.run.checkpointing import load_tensors
from tests.checkpoints import save_tiny
from tests.command import ROOT, esft_process
from tests.notes import Notes
from tests.resumed_runs import (
    STEPS,
    cut_back,
    delta_bytes,
    files_of,
    logged,
    recipe,
    write_rows,
)

PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.mark.slow
def test_the_command_killed_and_resumed(base: Path, data: Path, tmp_path: Path) -> None:
    """Nothing but `esft train`, `kill -9` and `esft train --resume`, each a fresh process."""
    long = recipe(base, data, max_steps=40, save_steps=5, logging_steps=5)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(long))
    esft.train(file, tmp_path / "whole")
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "esft_cli", "train", str(file), "--out", str(run)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(run.glob("checkpoints/step-*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "delta").exists()
    result = esft_process("train", file, "--out", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert delta_bytes(run) == delta_bytes(tmp_path / "whole")
    assert logged(run) == logged(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, 4),  # in the middle of an epoch
        ({"save_steps": 7}, 7),  # at its end
        ({}, 10),  # only the delta is missing
        ({"gradient_accumulation_steps": 2, "save_steps": 3}, 3),
        ({"data": {"packing": True}}, 6),
        ({"param_dtype": "bfloat16"}, 6),
        ({"method": "random"}, 6),
        ({"method": "lora"}, 6),
        ({"method": "full"}, 6),
        ({"optim": "adafactor"}, 6),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, 6),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, 6),
        ({"save_strategy": "epoch"}, 7),
        # A rate that the score at the epoch's end decides, which falls on a step that is saved.
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
                "metric_for_best_model": "loss",
                "greater_is_better": True,  # so that every score is a worse one
                "eval_strategy": "epoch",
                "eval_on_start": True,
                "save_steps": 7,
            },
            7,
        ),
        # What was summed up since the last line of the log is not lost.
        ({"logging_steps": 3}, 4),
        # Another order of the rows; rows read by another process.
        ({"train_sampling_strategy": "group_by_length"}, 4),
        ({"train_sampling_strategy": "group_by_length"}, 8),
        ({"dataloader_num_workers": 1}, 8),
        # fp32 state of bf16 parameters, which torch would round when it is loaded.
        ({"param_dtype": "bfloat16", "optim": "adafactor"}, 6),
    ],
)
def test_resumed_from_any_step(
    base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    if "eval_strategy" in changes:
        changes = changes | {"data": {"eval": str(data)}, "eval_steps": 2}
    wanted = recipe(base, data, checkpoints={"keep_last": 99}, **changes)
    run = tmp_path / "run"
    whole = esft.train(wanted, run)
    expected, lines = delta_bytes(run), logged(run)
    cut_back(run, step)
    result = esft.train(wanted, run, resume=True)
    assert delta_bytes(run) == expected
    assert logged(run) == lines
    assert result.steps == STEPS
    assert result.train_loss == whole.train_loss
    assert (run / "README.md").is_file()


def test_only_what_trains_is_saved(base: Path, data: Path, tmp_path: Path) -> None:
    result = esft.train(recipe(base, data), tmp_path / "run")
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["step-000008", "step-000010"]
    state = load_file(tmp_path / "run" / "checkpoints" / folders[-1] / "state.safetensors")
    by_kind: dict[str, int] = {}
    for name, tensor in state.items():
        kind = name.partition("/")[0]
        by_kind[kind] = by_kind.get(kind, 0) + tensor.numel() * (tensor.dim() > 1)
    assert by_kind["parameter"] == result.trained
    assert by_kind["optimizer"] == 2 * result.trained


@pytest.fixture(scope="module")
def complete(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete run, its recipe, and the files that it was made from."""
    folder = tmp_path_factory.mktemp("complete")
    shutil.copytree(base, folder / "base")
    shutil.copy(data, folder / "train.jsonl")
    (folder / "selection.json").write_text('{"0": [1, 2], "2": [5]}')
    wanted = recipe(
        folder / "base", folder / "train.jsonl", selection=str(folder / "selection.json")
    )
    (folder / "recipe.json").write_text(json.dumps(wanted))
    esft.train(wanted, folder / "run")
    return folder


@pytest.fixture
def interrupted(complete: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of it, killed after step 8: files may lie elsewhere when a run is resumed."""
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    cut_back(tmp_path / "run", 8)
    text = (tmp_path / "recipe.json").read_text()
    return tmp_path / "run", json.loads(text.replace(str(complete), str(tmp_path)))


def test_files_may_lie_elsewhere(interrupted: tuple[Path, dict[str, Any]], complete: Path) -> None:
    run, wanted = interrupted
    assert not wanted["model"].startswith(str(complete))
    esft.train(wanted, run, resume=True)
    assert delta_bytes(run) == delta_bytes(complete / "run")


def change_rate(wanted: dict[str, Any]) -> None:
    wanted["training"]["learning_rate"] = 2e-2


def change_method(wanted: dict[str, Any]) -> None:
    wanted["method"] = "full"
    del wanted["selection"]


def change_length(wanted: dict[str, Any]) -> None:
    wanted["data"]["max_length"] = 17


def change_data(wanted: dict[str, Any]) -> None:
    path = Path(wanted["data"]["train"])
    path.write_text(path.read_text().replace("abc", "abd"))


def change_selection(wanted: dict[str, Any]) -> None:
    Path(wanted["selection"]).write_text('{"0": [1, 2], "2": [6]}')


def change_base(wanted: dict[str, Any]) -> None:
    file = Path(wanted["model"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_rate, "  recipe.training.learning_rate: 0.01 then, 0.02 now"),
        (change_method, "  recipe.method: esft then, full now"),
        (change_length, "  data.max_length: 16 then, 17 now"),
        (change_data, "  data.train: "),
        (change_selection, "  selection.2: [5] then, [6] now"),
        (change_base, "  base.model.norm.weight.sha256: "),
    ],
)
def test_a_run_that_has_changed_is_not_resumed(
    interrupted: tuple[Path, dict[str, Any]],
    change: Callable[[dict[str, Any]], None],
    difference: str,
) -> None:
    run, wanted = interrupted
    change(wanted)
    before = files_of(run)
    with pytest.raises(EsftError, match="step-000008: cannot resume, the run has changed:") as got:
        esft.train(wanted, run, resume=True)
    assert got.value.exit_code == 1
    assert any(line.startswith(difference) for line in str(got.value).splitlines()), got.value
    assert files_of(run) == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["state.safetensors", "trainer_state.json", "state.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_refused(
    interrupted: tuple[Path, dict[str, Any]], name: str, damage: Callable[[Path], None]
) -> None:
    run, wanted = interrupted
    damage(run / "checkpoints" / "step-000008" / name)
    before = files_of(run)
    with pytest.raises(CheckError, match=name) as caught:
        esft.train(wanted, run, resume=True)
    assert caught.value.exit_code == 3
    assert files_of(run) == before


def test_a_line_cut_off_in_the_log_is_no_matter(interrupted: tuple[Path, dict[str, Any]]) -> None:
    run, wanted = interrupted
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    esft.train(wanted, run, resume=True)
    assert [line["step"] for line in logged(run)] == list(range(1, STEPS + 1))


def test_there_must_be_something_to_resume(base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(EsftError, match="no complete checkpoint to resume from"):
        esft.train(recipe(base, data), run, resume=True)
    assert not run.exists()
    esft.train(recipe(base, data, max_steps=1, save_strategy="no"), run)
    with pytest.raises(EsftError, match="this run is complete"):
        esft.train(recipe(base, data), run, resume=True)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    complete: Path, tmp_path: Path
) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    shutil.rmtree(run / "delta")
    flip(run / "checkpoints" / "step-000010" / "state.safetensors")
    text = (tmp_path / "recipe.json").read_text().replace(str(complete), str(tmp_path))
    told = Notes()
    esft.train(json.loads(text), run, resume=True, reporter=told)
    assert any(
        "step-000010/state.safetensors: damaged" in note and "going on from step 8" in note
        for note in told.notes
    )
    assert delta_bytes(run) == delta_bytes(complete / "run")
    assert [saved.step for saved in checkpoint.complete(run / "checkpoints")] == [8, 10]
    checkpoint.SavedState(run / "checkpoints" / "step-000010").check()


def test_one_of_the_first_format_is_refused(interrupted: tuple[Path, dict[str, Any]]) -> None:
    run, wanted = interrupted
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
        (folder / "state.json").write_text('{"format": "esft-checkpoint/1", "step": 8}')
    with pytest.raises(CheckError, match="of format esft-checkpoint/1, which cannot be resumed"):
        esft.train(wanted, run, resume=True)


def test_other_threads_are_refused_on_a_cpu(interrupted: tuple[Path, dict[str, Any]]) -> None:
    run, wanted = interrupted
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(EsftError, match=f"set OMP_NUM_THREADS={threads}$"):
            esft.train(wanted, run, resume=True)
    finally:
        torch.set_num_threads(threads)


def test_the_last_and_the_best_are_kept(base: Path, data: Path, tmp_path: Path) -> None:
    """Whatever the scores are, by a rate that makes them rise and fall."""
    wanted = recipe(
        base,
        data,
        data={"eval": str(data)},
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        learning_rate=0.3,
        checkpoints={"keep_last": 1, "keep_best": 2},
    )
    esft.train(wanted, tmp_path / "run")
    lines = [line for line in logged(tmp_path / "run") if "eval_loss" in line]
    scores = {line["step"]: line["eval_loss"] for line in lines}
    assert len(scores) == STEPS
    best = sorted(scores, key=lambda step: scores[step])
    folder = tmp_path / "run" / "checkpoints"
    kept = checkpoint.complete(folder)
    assert {saved.step for saved in kept} == {*best[:2], STEPS}
    assert [saved.metrics["eval_loss"] for saved in kept] == [scores[s.step] for s in kept]
    for metric in ("loss", "eval_loss"):
        found = checkpoint.best(folder, metric)
        assert found is not None
        assert found.step == best[0]
    assert checkpoint.best(folder, "accuracy") is None


def test_best_needs_scores(base: Path, data: Path) -> None:
    wanted = recipe(base, data, checkpoints={"keep_best": 1})
    with pytest.raises(RecipeError, match=r"checkpoints\.keep_best: needs .*eval_strategy"):
        make_recipe(wanted)
    with pytest.raises(RecipeError, match=r"set checkpoints\.keep_last instead"):
        make_recipe(recipe(base, data, save_total_limit=3))


def test_training_in_another_thread(base: Path, data: Path, tmp_path: Path) -> None:
    """Where Python can install no handlers."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(esft.train(recipe(base, data, max_steps=1), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 1


def test_what_is_restored_must_be_what_was_saved(tmp_path: Path) -> None:
    """As when a library casts, shuffles or keeps its initial values while it loads."""
    weights = {"a": torch.tensor([0.1, 0.2]), "b": torch.ones(3)}
    nothing: dict[str, Any] = {"trainer": {}, "guard": {}, "environment": {}}
    saved = checkpoint.save(tmp_path, step=1, state={"parameter": weights}, **nothing)
    into = {"a": torch.zeros(2), "b": torch.zeros(3)}
    load_tensors(into, saved, "parameter")
    assert torch.equal(into["a"], weights["a"])
    for wrong in (
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(3)},
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)},
        {"a": torch.zeros(2), "b": torch.zeros(4)},
    ):
        with pytest.raises(CheckError, match="step-000001: "):
            load_tensors(wrong, saved, "parameter")

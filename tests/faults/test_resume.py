"""R1 to R6: a run that is killed, stopped or moved comes to the same bits, or says why it cannot.

`make faults` runs all of R1 and R2; `make test` a part of them that has every moment and every
kind of run, see tests/faults/counts.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import esft
from esft.errors import EsftError
from esft.run import checkpoint
from tests.checkpoints import save_tiny
from tests.faults.trainings import Trainings
from tests.resumed_runs import STEPS, cut_back, delta_bytes, files_of, logged, recipe, write_rows

FULL = os.environ.get("ESFT_FAULTS") == "full"
# Two kinds of arithmetic, with and without accumulation: 7 or 2 steps an epoch.
KINDS = [(dtype, accumulated) for dtype in ("float32", "bfloat16") for accumulated in (1, 4)]
KILLED_STEPS = 6

# Where R1 kills, and the last complete checkpoint that it leaves: the second one, of step 4, is
# written while that of step 2 is the only one, which then goes (keep_last: 1).
SAVE_POINTS: dict[str, tuple[dict[str, Any], int]] = {
    "before it begins": ({"place": "a checkpoint", "call": 1}, 2),
    "before its folder": ({"place": "its folder"}, 2),
    "before its tensors": ({"place": "its tensors"}, 2),
    "in the middle of its tensors": ({"place": "its tensors", "half": True}, 2),
    "before its state": ({"place": "its state"}, 2),
    "before the loop's state": ({"place": "its state", "call": 1}, 2),
    "before its manifest": ({"place": "its manifest"}, 2),
    "before it is synced": ({"place": "a sync", "call": 3}, 2),
    "before it is renamed": ({"place": "a rename"}, 2),
    "after it is renamed": ({"place": "a sync of a folder", "call": 4}, 4),
    "before the old one goes": ({"place": "a deletion"}, 4),
    "while the old one goes": ({"place": "a deletion of what is hidden"}, 4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with Trainings(tmp_path_factory.mktemp("trainings")) as started:
        yield started


def killed_recipe(base: Path, data: Path, kind: tuple[str, int]) -> dict[str, Any]:
    dtype, accumulated = kind
    wanted = recipe(
        base,
        data,
        checkpoints={"keep_last": 1},
        max_steps=KILLED_STEPS,
        gradient_accumulation_steps=accumulated,
    )
    return wanted | {"dtype": dtype}


@pytest.fixture(scope="module")
def whole(
    base: Path, data: Path, trainings: Trainings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, int]], Path]:
    """A run of each kind that nobody killed."""
    runs: dict[tuple[str, int], Path] = {}

    def run(kind: tuple[str, int]) -> Path:
        if kind not in runs:
            out = tmp_path_factory.mktemp("whole") / "run"
            ended = trainings.run(killed_recipe(base, data, kind), out)
            assert ended.code == 0, ended.output
            runs[kind] = out
        return runs[kind]

    return run


def assert_same(run: Path, other: Path) -> None:
    """The same weights to the bit, the same log, the same checkpoint; nothing left lying about."""
    assert delta_bytes(run) == delta_bytes(other)
    assert logged(run) == logged(other)
    last = f"checkpoints/step-{KILLED_STEPS:06d}/state.safetensors"
    assert (run / last).read_bytes() == (other / last).read_bytes()
    assert {str(p.relative_to(run)) for p in run.rglob("*")} == {
        str(p.relative_to(other)) for p in other.rglob("*")
    }


def some(cases: list[Any], part: list[Any]) -> list[Any]:
    return cases if FULL else part


ALL_R1 = [(point, kind) for point in SAVE_POINTS for kind in KINDS]
PART_R1 = [(point, KINDS[n % len(KINDS)]) for n, point in enumerate(SAVE_POINTS)]
assert len(ALL_R1) == 48


@pytest.mark.parametrize(("point", "kind"), some(ALL_R1, PART_R1))
def test_r1_killed_while_saving(
    trainings: Trainings,
    base: Path,
    data: Path,
    whole: Callable[[tuple[str, int]], Path],
    tmp_path: Path,
    point: str,
    kind: tuple[str, int],
) -> None:
    wanted, run = killed_recipe(base, data, kind), tmp_path / "run"
    stop, left = SAVE_POINTS[point]
    saves = 0 if stop["place"] == "a checkpoint" else 2
    trainings.kill(wanted, run, stops=[{"saves": saves, **stop}])
    found, damaged = checkpoint.whole(run / "checkpoints")
    assert (found.step, damaged) == (left, [])
    assert not (run / "delta").exists()
    ended = trainings.run(wanted, run, resume=True)
    assert ended.code == 0, ended.output
    assert_same(run, whole(kind))


@pytest.mark.parametrize("case", some(list(range(20)), [0, 5, 10, 15]))
def test_r2_killed_at_a_random_step(
    trainings: Trainings,
    base: Path,
    data: Path,
    whole: Callable[[tuple[str, int]], Path],
    tmp_path: Path,
    case: int,
) -> None:
    kind = KINDS[case % len(KINDS)]
    wanted, run = killed_recipe(base, data, kind), tmp_path / "run"
    # Accumulated over 4, an epoch of 7 batches has steps of 4 and of 3.
    batches = {1: KILLED_STEPS, 4: KILLED_STEPS * 7 // 2}[kind[1]]
    call = random.Random(case).randrange(batches)
    trainings.kill(wanted, run, stops=[{"place": "a batch", "call": call}])
    # Before the first checkpoint too: then from the beginning.
    ended = trainings.run(wanted, run, resume=True)
    assert ended.code == 0, ended.output
    assert_same(run, whole(kind))


@pytest.fixture(scope="module")
def every_step(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[dict[str, Any], Path]]:
    """A complete run with a checkpoint of every step, with packing and without."""
    made: dict[bool, tuple[dict[str, Any], Path]] = {}

    def run(packing: bool) -> tuple[dict[str, Any], Path]:
        if packing not in made:
            options = {"packing": packing, "max_length": 24}
            wanted = recipe(base, data, data=options, save_steps=1, checkpoints={"keep_last": 99})
            out = tmp_path_factory.mktemp("every") / "run"
            esft.train(wanted, out)
            made[packing] = wanted, out
        return made[packing]

    return run


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("where", ["step 0", "mid-epoch", "boundary", "last"])
def test_r3_resumed_from(
    every_step: Callable[[bool], tuple[dict[str, Any], Path]],
    tmp_path: Path,
    where: str,
    packing: bool,
) -> None:
    wanted, complete = every_step(packing)
    loops = {
        saved.step: saved.read("loop")["cursor"]
        for saved in checkpoint.complete(complete / "checkpoints")
    }
    steps = {
        "step 0": 0,
        "mid-epoch": next(s for s, at in loops.items() if at["epoch"] and at["batch"]),
        "boundary": next(s for s, at in loops.items() if not at["batch"]),
        "last": STEPS,
    }
    run = tmp_path / "run"
    shutil.copytree(complete, run)
    cut_back(run, steps[where])
    esft.train(wanted, run, resume=True)
    assert delta_bytes(run) == delta_bytes(complete)
    assert logged(run) == logged(complete)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_r4_stopped_by_a_signal(
    trainings: Trainings,
    base: Path,
    data: Path,
    whole: Callable[[tuple[str, int]], Path],
    tmp_path: Path,
    number: signal.Signals,
    times: int,
) -> None:
    """Once: the step under way ends and is saved. Twice: nothing of the second save is seen."""
    kind = KINDS[0]
    wanted, run = killed_recipe(base, data, kind), tmp_path / "run"
    stops = [{"place": "a batch", "call": 2}, {"place": "its manifest", "saves": 2}][:times]
    started = trainings.start(wanted, run, stops=stops)
    for _ in range(times):
        assert started.paused()
        started.send(number)
        started.go()
    code, output = started.wait()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in output
    saved = checkpoint.last(run / "checkpoints")
    assert saved is not None
    assert saved.step == {1: 3, 2: 2}[times]
    assert output.splitlines()[-1] == (
        f"interrupted by {number.name}; step {saved.step} is saved; go on with: "
        f"esft train {run / 'recipe.yaml'} --out {run} --resume"
    )
    assert [p.name for p in run.rglob(".*")] == []
    # As it says: with the recipe that the run wrote.
    told = json.loads(json.dumps(wanted)) | {"model": str(base)}
    assert trainings.run(told, run, resume=True).code == 0
    assert delta_bytes(run) == delta_bytes(whole(kind))
    assert logged(run) == logged(whole(kind))


def test_a_signal_while_the_delta_is_written(
    trainings: Trainings,
    base: Path,
    data: Path,
    whole: Callable[[tuple[str, int]], Path],
    tmp_path: Path,
) -> None:
    """All steps are done and none is saved: they are, and resuming has only the delta to write."""
    kind = KINDS[0]
    wanted, run = killed_recipe(base, data, kind), tmp_path / "run"
    wanted["training"]["save_strategy"] = "no"
    started = trainings.start(wanted, run, stops=[{"place": "a delta's tensors"}])
    assert started.paused()
    started.send(signal.SIGTERM)
    code, output = started.wait()
    assert code == 143, output
    assert f"step {KILLED_STEPS} is saved; go on with" in output.splitlines()[-1]
    assert not (run / "delta").exists()
    assert [p.name for p in run.rglob(".*")] == []
    assert trainings.run(wanted, run, resume=True).code == 0
    assert delta_bytes(run) == delta_bytes(whole(kind))


def test_a_signal_before_training(
    trainings: Trainings, base: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = trainings.start(
        killed_recipe(base, data, KINDS[0]), run, stops=[{"place": "profiling"}]
    )
    assert started.paused()
    started.send(signal.SIGINT)
    code, output = started.wait()
    assert code == 130
    assert output.splitlines()[-1] == "interrupted by SIGINT; nothing was written yet"
    assert not run.exists()


@pytest.fixture(scope="module")
def to_change(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed after step 8, its recipe, and what it was made from."""
    folder = tmp_path_factory.mktemp("to_change")
    save_tiny(folder / "base", "qwen3_moe")
    shutil.copy(data, folder / "train.jsonl")
    shutil.copy(data, folder / "eval.jsonl")
    (folder / "selection.json").write_text('{"0": [1, 2], "2": [5]}')
    wanted = recipe(
        folder / "base",
        folder / "train.jsonl",
        data={"eval": str(folder / "eval.jsonl")},
        selection=str(folder / "selection.json"),
    )
    (folder / "recipe.json").write_text(json.dumps(wanted))
    esft.train(wanted, folder / "run")
    cut_back(folder / "run", 8)
    return folder


def change_rate(wanted: dict[str, Any], folder: Path) -> None:
    wanted["training"]["learning_rate"] = 2e-2


def change_method(wanted: dict[str, Any], folder: Path) -> None:
    wanted["method"] = "full"
    del wanted["selection"]


def change_loss(wanted: dict[str, Any], folder: Path) -> None:
    wanted["data"]["loss_on"] = "all"


def change_rows(wanted: dict[str, Any], folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("abc", "abd"))


def change_test_rows(wanted: dict[str, Any], folder: Path) -> None:
    path = folder / "eval.jsonl"
    path.write_text(path.read_text().replace("abc", "abd"))


def change_selection(wanted: dict[str, Any], folder: Path) -> None:
    (folder / "selection.json").write_text('{"0": [1, 2], "2": [6]}')


def change_weights(wanted: dict[str, Any], folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def change_tokenizer(wanted: dict[str, Any], folder: Path) -> None:
    """Two letters are each other's tokens: other ids for the same text."""
    file = folder / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_rate, "  recipe.training.learning_rate: 0.01 then, 0.02 now"),
        (change_method, "  recipe.method: esft then, full now"),
        (change_loss, "  data.loss_on: completion then, all now"),
        (change_rows, "  data.train"),
        (change_test_rows, "  data.eval"),
        (change_selection, "  selection.2: [5] then, [6] now (FOLDER/selection.json)"),
        (change_weights, "  base.model.norm.weight.sha256: "),
        (change_tokenizer, "  data.tokens: "),
    ],
)
def test_r5_another_run_is_not_resumed(
    to_change: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], Path], None],
    difference: str,
) -> None:
    shutil.copytree(to_change, tmp_path, dirs_exist_ok=True)
    wanted = json.loads((tmp_path / "recipe.json").read_text().replace(str(to_change), "FOLDER"))
    wanted = json.loads(json.dumps(wanted).replace("FOLDER", str(tmp_path)))
    change(wanted, tmp_path)
    before = files_of(tmp_path / "run")
    with pytest.raises(EsftError, match="step-000008: cannot resume, the run has changed:") as got:
        esft.train(wanted, tmp_path / "run", resume=True)
    assert got.value.exit_code == 1
    lines = str(got.value).replace(str(tmp_path), "FOLDER").splitlines()
    assert any(line.startswith(difference) for line in lines), got.value
    assert max(map(len, lines)) < 200, "hashes are shortened"
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("resume", [False, True])
def test_r6_processes_that_cannot_find_each_other_are_refused(
    trainings: Trainings, to_change: Path, tmp_path: Path, variable: str, resume: bool
) -> None:
    """As mpirun tells its processes, or a cluster's scheduler; each would train all by itself."""
    run = tmp_path / "run"
    if resume:
        shutil.copytree(to_change / "run", run)
    before = files_of(run)
    wanted = json.loads((to_change / "recipe.json").read_text())
    ended = trainings.run(wanted, run, resume=resume, **{variable: "2", "RANK": "0"})
    assert ended.code == 1
    assert ended.output == (
        f"error: {variable}=2: launched as 2 processes that are not told where to find each "
        f"other (RANK, MASTER_ADDR, MASTER_PORT); start them with torchrun or accelerate launch: "
        f"torchrun --nproc-per-node 2 -m esft_cli train ...\n"
    )
    assert files_of(run) == before

"""Two processes train as one: the same curves, the same bits after a kill, one error for all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import esft
from tests.checkpoints import save_tiny
from tests.distributed import apart
from tests.distributed.launcher import Launch, run_scenarios, told
from tests.distributed.splits import EPOCHS_END, SPLITS, curve, split
from tests.resumed_runs import STEPS, cut_back, write_rows

SCENARIOS = "tests.distributed.train_scenarios"
NEAR = 1e-5
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def _messages(row: dict[str, str], weight: float) -> dict[str, Any]:
    """The same row as a conversation whose answer has a weight."""
    asked = {"role": "user", "content": row["prompt"]}
    answer = {"role": "assistant", "content": row["completion"], "weight": weight}
    return {"messages": [asked, answer]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "tiny", "qwen3_moe", template=TEMPLATE)
    rows = write_rows(folder / "train.jsonl").read_text().splitlines()
    weighted = [_messages(json.loads(row), 0.5 + n % 3) for n, row in enumerate(rows)]
    (folder / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weighted))
    for family in apart.FAMILIES:
        (folder / family).mkdir()
        apart.make(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of one process with checkpoints; `one` is the same cut back to step 6."""
    wanted = split(folder, {"batch": 4, "save_strategy": "steps"})
    esft.train(wanted | {"checkpoints": {"keep_last": 9}}, folder / "whole")
    shutil.copytree(folder / "whole", folder / "one")
    cut_back(folder / "one", 6)
    return folder / "whole"


@pytest.fixture(scope="module")
def launch(folder: Path, whole: Path) -> Launch:
    launch = run_scenarios(SCENARIOS, folder, limit=300)
    assert [end.code for end in launch.ended] == [0, 0], told(launch.ended)
    return launch


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_have_the_curve_of_one(
    folder: Path, launch: Launch, tmp_path: Path, name: str
) -> None:
    alone = esft.train(split(folder, SPLITS[name][1]), tmp_path / "run")
    expected = curve(tmp_path / "run")
    assert len(expected) == STEPS >= EPOCHS_END[-1]
    assert len(set(expected)) == STEPS, "the curve moves"
    assert curve(folder / "the_same_curves" / name) == pytest.approx(expected, abs=NEAR)
    for result in launch.results("the_same_curves"):
        assert result[name] == {
            "steps": STEPS,
            "loss": pytest.approx(alone.train_loss, abs=NEAR),
        }


@pytest.mark.parametrize("family", apart.FAMILIES)
@pytest.mark.parametrize("kind", apart.KINDS)
def test_experts_that_only_one_process_sees(
    folder: Path, launch: Launch, tmp_path: Path, family: str, kind: str
) -> None:
    """Nobody waits for a gradient that the other does not have, and all of them count."""
    alone = esft.train(apart.recipe(folder / family, kind, batch=2), tmp_path / "run")
    assert alone.moved is not None
    assert alone.moved.share > 0.5, "they are seen by somebody"
    run = folder / "experts_that_only_one_sees" / f"{family}-{kind}"
    expected = curve(tmp_path / "run")
    assert len(set(expected)) == len(expected) == 6
    assert curve(run) == pytest.approx(expected, abs=NEAR)


def test_the_weights_of_rows_count(folder: Path, launch: Launch) -> None:
    curves = [curve(folder / "the_same_curves" / name) for name in ("weighted", "plain")]
    assert curves[0] != pytest.approx(curves[1], abs=1e-2)


def test_tokens_are_those_of_all_processes(folder: Path, launch: Launch, whole: Path) -> None:
    def tokens(run: Path) -> list[int]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["tokens"] for line in lines]

    assert tokens(folder / "the_same_curves" / "plain") == tokens(whole)


def test_the_first_process_writes_the_run_once(folder: Path, launch: Launch, whole: Path) -> None:
    def files(run: Path) -> set[str]:
        found = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
        return {name for name in found if not name.startswith("checkpoints/")}

    run = folder / "the_same_curves" / "plain"
    assert files(run) == files(whole)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS + 1
    assert [end.stdout for end in launch.ended] == ["", ""]


def test_resumed_by_as_many_it_comes_to_the_same_bits(launch: Launch) -> None:
    assert launch.results("resumes_to_the_same_bits") == 2 * [{"same": True, "logged": True}]


def test_r6_one_process_goes_on_with_what_two_saved(
    folder: Path, launch: Launch, whole: Path, tmp_path: Path
) -> None:
    assert launch.results("saves_for_one_process") == 2 * [[2, 4, 6, 8, 10]]
    run = tmp_path / "run"
    shutil.copytree(folder / "saves_for_one_process" / "two", run)
    cut_back(run, 6)
    notes: list[str] = []
    reporter: Any = esft.progress.SilentReporter()
    reporter.note = notes.append
    wanted = split(folder, {"batch": 4, "save_strategy": "steps"})
    esft.train(wanted, run, resume=True, reporter=reporter)
    assert curve(run) == pytest.approx(curve(whole), abs=NEAR)
    assert any(note.startswith("processes: 2 when the run was saved, 1 now") for note in notes)


def test_r6_two_processes_go_on_with_what_one_saved(
    folder: Path, launch: Launch, whole: Path
) -> None:
    first, second = launch.results("goes_on_with_what_one_process_saved")
    kind, message = first["other rows"]
    assert kind == "EsftError"
    assert message.endswith(
        "step-000006: cannot resume with 2 processes: a step had 4 rows (1 x 4 x 1 accumulated), "
        "and would have 8 (2 x 4 x 1); set training.per_device_train_batch_size=2 and "
        "training.gradient_accumulation_steps=1"
    )
    assert "resumed" not in first, first
    assert second.keys() == first.keys()
    assert curve(folder / "one") == pytest.approx(curve(whole), abs=NEAR)


def test_a_signal_to_one_process_stops_all_after_the_same_step(launch: Launch) -> None:
    first, second = launch.results("a_signal_to_one_stops_both")
    assert first == second
    code, steps = first
    assert code == 143
    assert len(steps) == 1
    assert 3 <= steps[0] <= 5


@pytest.mark.parametrize(
    ("name", "teller", "message"),
    [
        ("the last one's recipe", 1, "data"),
        ("the last one's rows", 1, "missing.jsonl"),
        ("the first one's rows", 0, "missing.jsonl"),
        ("the folder", 0, "taken: the folder exists and is not empty"),
        ("the order of rows", 0, "would draw an order of its own"),
        ("a diverging run", 0, "the run has diverged"),
    ],
)
def test_an_error_of_one_process_ends_all_and_is_told_once(
    launch: Launch, name: str, teller: int, message: str
) -> None:
    results = launch.results("errors_of_one_end_both")
    kinds = [result[name][0] for result in results]
    assert message in results[teller][name][1]
    assert kinds[teller] != "ElsewhereError"
    assert kinds[1 - teller] == "ElsewhereError"


def test_nothing_is_written_where_the_input_is_at_fault(launch: Launch) -> None:
    for result in launch.results("errors_of_one_end_both"):
        for name in ("the last one's recipe", "the last one's rows", "the first one's rows"):
            assert result[f"{name}: written"] == []


def test_a_diverging_run_names_the_rows_of_all_processes(folder: Path, launch: Launch) -> None:
    report = json.loads((folder / "errors_of_one_end_both" / "e" / "diverged.json").read_text())
    assert [len(batch["rows"]) for batch in report["batches"]] == [2, 2]

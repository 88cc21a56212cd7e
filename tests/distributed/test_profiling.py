"""A profile that two processes share out: the scores of one process, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import esft
from tests.checkpoints import save_tiny
from tests.distributed.launcher import Ended, Launch, run, run_scenarios, told

SHARED_OUT = (
    "several_batches",
    "more_batches_than_parts",
    "fewer_batches_than_processes",
    "only_answers",
)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("profiling")
    return run_scenarios("tests.distributed.profiling_scenarios", folder)


@pytest.mark.parametrize("scenario", SHARED_OUT)
def test_scores_are_those_of_one_process_to_the_last_bit(launch: Launch, scenario: str) -> None:
    for whole, shared in launch.results(scenario):
        assert shared == whole
        some = next(iter(whole["layers"].values()))
        assert {"gate", "token", "halves", "routing", "cooccurrence"} <= set(some)
    first, second = launch.results(scenario)
    assert first == second


def test_rows_are_many_enough_that_ids_are_counted(launch: Launch) -> None:
    """Or the tables of frequent token ids would be empty, and equal."""
    (whole, _), _ = launch.results("several_batches")
    assert all(layer["routing"]["fixed_by_token"] for layer in whole["layers"].values())


def test_an_error_in_one_process_ends_both_and_is_told_once(launch: Launch) -> None:
    first, second = launch.results("one_fails")
    assert second == ["ModelError", "layer 3 is upside down"]
    assert first[0] == "ElsewhereError"
    assert "process 1 of 2 failed while they profile: layer 3 is upside down" in first[1]
    first, second = launch.results("one_has_a_bug")
    assert (first[0], second[0]) == ("ZeroDivisionError", "ElsewhereError")
    first, second = launch.results("both_fail")
    assert (first[0], second[0]) == ("ModelError", "ElsewhereError")


def test_a_killed_process_ends_the_other_with_a_message(launch: Launch) -> None:
    kind, message = launch.result("one_is_killed", 0)
    assert kind == "LostProcessError"
    assert "process 0 of 2: another process ended" in message
    assert launch.ended[1].code == -9


@pytest.mark.slow
def test_torchrun_writes_and_prints_once(tmp_path: Path) -> None:
    base, data = save_tiny(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n} " * (n % 7 + 1)} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def profile(out: Path, data: Path) -> list[Ended]:
        program = ["-m", "esft_cli", "profile", str(base), "--data", str(data), "--json"]
        return run([*program, "--out", str(out)], tmp_path / f"said.{out.stem}")

    first, second = profile(tmp_path / "shared.json", data)
    assert (first.code, second.code) == (0, 0), told([first, second])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those processes have
    esft.profile(str(base), data).write(tmp_path / "alone.json")
    torch.set_num_threads(threads)
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert json.loads(first.stdout)["out"] == str(tmp_path / "shared.json")
    assert second.stdout == second.stderr == ""

    ends = profile(tmp_path / "none.json", tmp_path / "missing.jsonl")
    assert [end.code for end in ends] == [1, 1]
    assert sum(end.stderr.count("error:") for end in ends) == 1, told(ends)

"""An error in one process ends all, told once; values and tensors arrive as they are."""

from __future__ import annotations

import pytest

from esft.errors import EsftError
from esft.processes import TIMEOUT, count, gathered, is_main, timeout, together
from tests.distributed.launcher import Launch, run_scenarios


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return run_scenarios(
        "tests.distributed.processes_scenarios",
        tmp_path_factory.mktemp("processes"),
        environment={TIMEOUT: "8"},
    )


def test_processes_know_their_numbers(launch: Launch) -> None:
    assert launch.results("who") == [[0, 2, True, True], [1, 2, False, True]]


def test_values_and_tensors_arrive(launch: Launch) -> None:
    first, second = launch.results("exchanged")
    assert first["gathered"] == second["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["summed"] == second["summed"] == [[3, 10], []]
    assert first["sent"] == [[], [[1.5] * 3] * 2]
    assert second["sent"] is None


def test_an_error_in_one_process_ends_the_others(launch: Launch) -> None:
    first, second = launch.results("error_in_one")
    assert second == ["ValueError", "no such number"]
    assert first == ["ElsewhereError", "process 1 of 2 failed while they try: no such number"]


def test_of_several_errors_the_first_process_tells_its_own(launch: Launch) -> None:
    first, second = launch.results("error_in_both")
    assert first == ["ValueError", "of 0"]
    assert second == ["ElsewhereError", "process 0 of 2 failed while they try: of 0"]


def test_a_process_that_waits_for_a_sum_learns_of_the_error(launch: Launch) -> None:
    first, second = launch.results("error_before_an_exchange")
    assert first == ["ValueError", "too early"]
    assert second == ["ElsewhereError", "process 0 of 2 failed while they add: too early"]


def test_an_error_is_told_once(launch: Launch) -> None:
    (first, after), (second, _) = launch.results("error_in_an_inner_block")
    assert first == ["ElsewhereError", "process 1 of 2 failed while they look closer: deep inside"]
    assert second == ["ValueError", "deep inside"]
    assert after == [0, 1]


def test_a_process_that_does_not_answer_is_waited_for_no_longer_than_said(launch: Launch) -> None:
    # The launch itself fails after this: its processes no longer wait for each other.
    (kind, message), seconds = launch.result("no_answer", 0)
    assert kind == "LostProcessError"
    assert "did not answer within 8 s (ESFT_TIMEOUT), while they try" in message
    assert seconds < 16


def test_a_process_alone_has_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (count(), is_main()) == (1, True)
    assert gathered(3, "gather") == [3]
    with pytest.raises(ValueError, match="mine"), together("try"):
        raise ValueError("mine")
    monkeypatch.setenv("WORLD_SIZE", "8")  # alone does not make a launcher
    assert (count(), is_main()) == (1, True)


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "inf"])
def test_a_timeout_must_be_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(EsftError, match=f"{TIMEOUT}={given}: must be a positive number"):
        timeout()

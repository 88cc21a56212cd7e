"""Work in a bounded child process: what comes back, and what is stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from esft.data import template_bounds
from esft.data.encode import encode_prompt
from esft.data.template_bounds import CHARACTERS, MEMORY, bounded, check_length
from esft.errors import DataError
from tests.toy_tokenizers import byte_tokenizer


def name(item: Any) -> str:
    return f"rows.jsonl:{item}"


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS", 1)


def test_results_come_in_order_from_one_other_process() -> None:
    found = list(bounded(lambda item: [item, os.getpid()], range(5), name))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    processes = {process for _, process in found}
    assert len(processes) == 1
    assert os.getpid() not in processes
    assert list(bounded(lambda item: item, [], name)) == []


def test_large_texts_of_any_letters_come_whole() -> None:
    text = "a\nü\u2028\U0001f600\ud800" * 300_000
    (found,) = bounded(lambda _: text, [0], name)
    assert found == text


def test_a_refusal_stands_in_its_place_and_the_work_goes_on() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise DataError("rows.jsonl:2: no")
        return item * item

    first, second, third, fourth = bounded(work, [0, 1, 2, 3], name)
    assert (first, second, fourth) == (0, 1, 9)
    assert isinstance(third, DataError)
    assert str(third) == "rows.jsonl:2: no"


@pytest.mark.usefixtures("one_second")
@pytest.mark.parametrize("endless", ["in bytecode", "inside C"])
def test_what_does_not_end_is_stopped_and_costs_only_itself(endless: str) -> None:
    def work(item: int) -> int:
        if item == 1:
            if endless == "inside C":
                10 ** (10**9)
            while True:
                pass
        return item

    usual = signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # which a child inherits
    started = time.process_time()
    try:
        before, stopped, after = bounded(work, range(3), name)
    finally:
        signal.signal(signal.SIGXCPU, usual)
    assert (before, after) == (0, 2)
    assert "rows.jsonl:1: the chat template is not done after 1 s" in str(stopped)
    assert time.process_time() - started < 1  # the time was the child's


@pytest.mark.parametrize("size", [2 * MEMORY, 2**60])
def test_memory_is_bounded(size: int) -> None:
    before, stopped, after = bounded(lambda item: len(bytes(item)), [1, size, 2], name)
    assert (before, after) == (1, 2)
    assert f"rows.jsonl:{size}: the chat template wants more than" in str(stopped)


def test_a_child_that_dies_otherwise_is_told_of() -> None:
    (found,) = bounded(lambda _: os.kill(os.getpid(), signal.SIGKILL), [7], name)
    assert str(found).startswith("rows.jsonl:7: the process that rendered")
    assert f"signal {signal.SIGKILL.value}" in str(found)


def test_a_mistake_of_ours_is_not_taken_for_the_users() -> None:
    with pytest.raises(RuntimeError, match=r"rows\.jsonl:0: .*\n(.*\n)*ZeroDivisionError"):
        list(bounded(lambda item: 1 // item, [0], name))


def test_who_stops_listening_leaves_no_process() -> None:
    outcomes = bounded(lambda item: [os.getpid(), "x" * 10**6], range(100), name)
    process, _ = next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_who_stops_listening_need_not_wait() -> None:
    outcomes = bounded(time.sleep, [0, 60], name)
    next(outcomes)
    started = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30


def test_memory_of_this_process_stays_as_it_is() -> None:
    seen: list[int] = []
    list(bounded(seen.append, [1, 2], name))
    assert seen == []


def test_lengths() -> None:
    assert check_length("x" * CHARACTERS)
    with pytest.raises(ValueError, match=f"{CHARACTERS + 1:,} characters"):
        check_length("x" * (CHARACTERS + 1))


@pytest.mark.usefixtures("one_second")
def test_prompts_are_bounded_too() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="--prompt: the chat template is not done"):
        encode_prompt("hello", byte_tokenizer(template=loop), chat=True)

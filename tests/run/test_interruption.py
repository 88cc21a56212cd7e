"""SIGINT and SIGTERM are caught in the main thread, for the length of a block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from esft.run.interruption import Interrupted, Interruption, interruptible


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_a_step_a_signal_ends_at_once(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, interruptible():
        send(number)
    assert caught.value.code == code
    assert signal.getsignal(number) == before


def test_the_first_waits_for_a_good_moment_and_the_second_does_not() -> None:
    done = []

    def step(interruption: Interruption) -> None:
        with interruption.at_a_good_moment():
            send(signal.SIGTERM)
            done.append("the step")
            assert interruption.signal == signal.SIGTERM
            send(signal.SIGINT)
            done.append("another")

    with interruptible() as interruption:
        with pytest.raises(Interrupted) as caught:
            step(interruption)
        # As the first one said; from now on the system's own answer, should cleaning up hang.
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert done == ["the step"]
    assert signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, None)


def test_one_that_waited_is_answered_when_the_block_ends() -> None:
    done = []

    def step() -> None:
        with interruptible() as interruption:
            with interruption.at_a_good_moment():
                send(signal.SIGINT)
                done.append("all of the step")
            done.append("what comes after it")

    with pytest.raises(Interrupted):
        step()
    assert done == ["all of the step"]


def test_an_error_is_not_hidden_by_a_signal() -> None:
    def step() -> None:
        with interruptible() as interruption, interruption.at_a_good_moment():
            send(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_program_that_does_not_catch_it_ends_with_its_code() -> None:
    script = (
        "import os, signal\n"
        "from esft.run.interruption import interruptible\n"
        "with interruptible(): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "")


def test_a_data_loader_s_process_outlives_ctrl_c_but_not_its_parent_s_order() -> None:
    """Ctrl-C goes to the whole group; the step under way still needs the loader's rows."""
    with interruptible():
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

"""The launcher of several processes: results by rank, and an end for what hangs."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run, run_scenarios, told

HANGS_OR_FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("out of paper")
time.sleep(600)
"""


def test_processes_form_a_group_and_return_results(tmp_path: Path) -> None:
    launch = run_scenarios("tests.distributed.launcher_scenarios", tmp_path)
    assert launch.results("adds") == [[3.0, 0, 2], [3.0, 1, 2]]
    assert [end.code for end in launch.ended] == [0, 0], told(launch.ended)
    with pytest.raises(AssertionError, match="rank 1: exit code 0"):
        launch.results("another")


def test_a_process_that_hangs_is_killed_and_what_the_other_said_is_kept(tmp_path: Path) -> None:
    hung, failed = run(["-c", HANGS_OR_FAILS], tmp_path, limit=3)
    assert (hung.code, failed.code) == (None, 1)
    assert "out of paper" in failed.stderr

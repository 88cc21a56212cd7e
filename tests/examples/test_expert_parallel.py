"""The example of processes that share a model trains, and its delta merges."""

from pathlib import Path

import pytest

from esft.locating import TINY_MOE_FOLDER
from esft.merging import merge
from tests.distributed.launcher import ROOT, run, told

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers >= 5.21")


@pytest.mark.slow
def test_processes_that_share_a_model_train_it(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "expert_parallel.py")
    first, second = run([script, str(tmp_path / "delta"), "11"], tmp_path / "said")
    assert (first.code, second.code) == (0, 0), told([first, second])
    losses = [float(line.split()[3].strip(",")) for line in first.stdout.splitlines()]
    assert losses[1] < losses[0] - 0.5
    assert second.stdout == ""
    merge(TINY_MOE_FOLDER, tmp_path / "delta", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()

"""examples/trl_sft.py and trl_dpo.py, run as their first lines say, for a few steps."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_it_trains_merges_and_verifies(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["example", str(out), "4"])
    runpy.run_path(str(EXAMPLES / f"trl_{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "all 824 tensors are the base's or the delta's" in printed
    manifest = json.loads((out / "delta" / "esft_config.json").read_text())
    assert manifest["training"]["steps"] == 4
    assert manifest["base"]["fingerprint"]
    assert (out / "merged" / "model.safetensors").is_file()
    if name == "sft":
        before, after = (float(x) for x in re.findall(r"loss ([\d.]+)", printed)[-2:])
        assert after < before - 0.2
    else:
        margins = [float(x) for x in re.findall(r"preferred by (-?[\d.]+)", printed)]
        assert margins[0] == 0
        assert margins[-1] > margins[0]

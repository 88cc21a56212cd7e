"""`kernels/bench/tune.py` on a CPU: what it writes is a table that a layer runs with."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, python_process
from esft_kernels import SwiGLU, config, naive, tiled
from expert_layers import error, exact, inputs, make_bank, run

BENCH = ROOT / "kernels" / "bench"
CONFIGS = ROOT / "kernels" / "esft_kernels" / "configs"
KEY = ("H", "I", "rows", "itemsize")


def entries(path: Path) -> dict[tuple[int, ...], dict[str, Any]]:
    table = json.loads(path.read_text(encoding="utf-8"))
    return {tuple(entry[key] for key in KEY): entry for entry in table["entries"]}


@pytest.mark.slow
def test_writes_a_table_that_a_layer_runs_with(tmp_path, monkeypatch):
    table = tmp_path / "sm_90.json"
    text = json.loads((CONFIGS / "sm_90.json").read_text(encoding="utf-8"))
    stale = text["entries"][0] | {"H": 32, "I": 16, "rows": 8, "block_m": 256}
    text["entries"].append(stale)
    table.write_text(json.dumps(text), encoding="utf-8")
    script = (BENCH / "tune.py", "--smoke", "--configs", tmp_path, "--models", "Qwen3-30B-A3B")
    ran = python_process(*script, TRITON_INTERPRET="1", timeout=600)
    assert ran.returncode == 0, ran.stderr
    before, after = entries(CONFIGS / "sm_90.json"), entries(table)
    new = after.pop((32, 16, 8, 2))
    assert new["block_m"] != stale["block_m"]
    assert after == before
    assert re.fullmatch(r"measured \d{4}-\d\d-\d\d, .*; torch \S+, triton \S+", new["source"])

    found = list(entries(table).values())
    monkeypatch.setattr(config, "table", lambda arch: found)
    config.nearest.cache_clear()
    tiles = config.nearest("sm_90", 2, 32, 16, 8)
    config.nearest.cache_clear()
    assert tiles.block_m == new["block_m"]
    assert tiles.kernels == {name: new[name] for name in config.KERNELS}
    monkeypatch.setattr(tiled, "layer_config", lambda *_: tiles)
    bank = make_bank([1, 3], dtype=torch.bfloat16, hidden=32, inner=16, activation=SwiGLU())
    args = inputs(20, 2, torch.bfloat16, hidden=32)
    out, grads = run(tiled.moe_mlp, args, bank)
    expected, expected_grads = run(naive.moe_mlp, *exact(args, bank))
    assert error(out, expected) < 2e-2
    assert all(error(a, b) < 2e-2 for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.slow
def test_drops_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "kernels"))
    tune, setting = map(importlib.import_module, ("tune", "gpu_setting"))
    options = {"num_warps": 8, "num_stages": 4}
    good = {"BN": 64, "BK": 32, **options}
    large = {"BN": 256, "BK": 64, **options}  # 144 KB of shared memory, of 99
    whole = {"BN": 128, "BK": 32, "SPLIT": 1, **options}  # an epilogue too large for the registers
    candidates = {
        "up_swiglu_fwd": [good],
        "grouped_gemm": [good, large],
        "gather_sum": [{"BT": 4, "BH": 512, "num_warps": 4, "num_stages": 1}],
        "down_dact_bwd": [good | {"SPLIT": 2}, whole],
        "wgrad_selected": [{"BP": 128, "BQ": 128, "BR": 32, "num_warps": 8, "num_stages": 3}],
    }
    left = tune.fitting("sm_86", setting.Shape(512, 256, 8, 2), 64, 128, candidates, ["plain"])
    assert left == candidates | {"grouped_gemm": [good], "down_dact_bwd": [good | {"SPLIT": 2}]}

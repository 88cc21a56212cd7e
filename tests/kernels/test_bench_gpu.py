"""`kernels/bench/gpu.py` on a CPU: each row that a GPU would fill is there, and checks pass."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
from command import ROOT, Result, python_process

SCRIPT = ROOT / "kernels" / "bench" / "gpu.py"
MODELS = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite")
TOKENS = ("8k", "32k")
ROUTINGS = ("uniform", "skewed")
SHARES = ("0.05", "0.1", "0.25")
PHASES = ("forward", "backward", "step")
DENSE = ("grouped_mm full", "transformers full", "grouped_mm frozen", "transformers frozen")
SPARSE = ("esft triton", "esft grouped", "grouped_mm prefix dW")
KERNELS = (
    "route",
    "up_swiglu_fwd",
    "grouped_gemm down",
    "gather_sum out",
    "down_dact_bwd",
    "wgrad_selected down",
    "wgrad_selected up",
    "grouped_gemm dx",
    "gather_sum dx",
)
CASES = ("uniform", "skewed", "empty experts", "one expert has all rows", "experts held elsewhere")
RESULTS = ("out", "dx", "d_gates", "d_up", "d_down")


def smoke(out: Path, *arguments: str) -> Result:
    return python_process(
        SCRIPT, "--smoke", "--out", out, *arguments, TRITON_INTERPRET="1", timeout=600
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_fills_every_row(tmp_path):
    ran = smoke(tmp_path / "gpu.csv", "--minutes", "60")
    assert ran.returncode == 0, ran.stderr
    rows = rows_of(tmp_path / "gpu.csv")
    settings = list(itertools.product(MODELS, TOKENS, ROUTINGS))
    layers = [
        (*setting, share, name, phase)
        for setting, phase in itertools.product(settings, PHASES)
        for share, name in [
            *itertools.product(["0"], DENSE),
            *itertools.product(SHARES, SPARSE),
        ]
    ]
    kernels = [
        (*setting, share, name, "")
        for setting, share, name in itertools.product(settings, SHARES, KERNELS)
    ]
    keys = ("model", "tokens", "routing", "share", "name", "phase")
    for kind, expected in {"layer": layers, "kernel": kernels}.items():
        found = [row for row in rows if row["kind"] == kind]
        assert sorted(tuple(row[key] for key in keys) for row in found) == sorted(expected)
        assert all(float(row["ms"]) > 0 and float(row["floor_ms"]) > 0 for row in found)
        assert all(0 < float(row["row_share"]) <= 1 for row in found if row["share"] != "0")
    assert [row["name"] for row in rows if row["kind"] == "ceiling"] == ["matrix product", "copy"]

    table = [line for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(settings) * len(SHARES)
    assert len({line.count("|") for line in table}) == 1

    checks = {(row["name"], row["phase"]): row for row in rows if row["kind"] == "check"}
    for model, case, result in itertools.product(MODELS, CASES, (*RESULTS, "same bits again")):
        row = checks[f"{model}, {case}", result]
        assert float(row["error"]) < float(row["bound"]) <= 0.02
    for result in RESULTS:  # only a GPU has the memory
        assert checks["an index past 2^31", result]["note"]


def test_says_what_the_minutes_did_not_suffice_for(tmp_path):
    ran = smoke(tmp_path / "gpu.csv", "--minutes", "0")
    assert ran.returncode == 0, ran.stderr
    rows = rows_of(tmp_path / "gpu.csv")
    assert not [row for row in rows if row["kind"] in ("layer", "kernel")]
    left_out = {
        tuple(row[key] for key in ("model", "tokens", "routing", "share"))
        for row in rows
        if row["kind"] == "left out"
    }
    assert left_out == set(itertools.product(MODELS, TOKENS, ROUTINGS, ("0", *SHARES)))
    assert "32 cases left out" in ran.stdout


def test_asks_for_a_gpu(tmp_path):
    ran = python_process(SCRIPT, "--out", tmp_path / "gpu.csv", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1
    assert "no GPU" in ran.stderr

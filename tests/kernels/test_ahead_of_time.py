"""What a GPU would run: the kernels compiled for three architectures, none of which is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from esft_kernels.quantised import KINDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels" / "bench" / "ahead_of_time.py"
# KB of shared memory that a block may use: CUDA C++ Programming Guide, table of technical
# specifications per compute capability.
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_compiles_to_what_a_gpu_runs_fast(arch, tmp_path):
    kernels, lines = compiled(arch, tmp_path)
    assert {line["kernel"] for line in lines} == kernels
    assert {line["itemsize"] for line in lines} == {2, 4}
    assert {line["layout"] for line in lines} == {"plain", "interleaved", "generic", *KINDS}
    # For each kind a kernel that dequantises; the others are those of a dense bank.
    stored = [line for line in lines if line["layout"] in KINDS]
    assert {line["kernel"] for line in stored} == {"_dequantise"}
    assert not [line for line in lines if line["spill"] or line["stack"]]
    assert not [line for line in lines if line["shared"] > SHARED[arch] * 1024]
    products = [line for line in lines if line["product"] and line["itemsize"] == 2]
    assert {line["kernel"] for line in products} == {
        "_up_swiglu_fwd",
        "_grouped_gemm",
        "_down_dact_bwd",
        "_wgrad_selected",
    }
    instruction = "wgmma" if arch == "sm_90" else "tensor_core"
    assert not [line for line in products if not line[instruction]]
    assert not [line for line in products if wide_bytes(line) < tile_bytes(line)]


def wide_bytes(line: dict[str, Any]) -> int:
    """Return what a block's 16-byte copies to shared memory bring, if each runs once."""
    return line["wide_copies"] * 16 * 32 * line["options"]["num_warps"]


def tile_bytes(line: dict[str, Any]) -> int:
    """Return the size of the tiles that these copies must bring: a narrower copy would show.

    Each stage of the loop's pipeline has copies of its own. Where a weight gradient gathers an
    operand, its pipeline is shorter; copies for one stage at least are there.
    """
    c, stages = line["constants"], line["options"]["num_stages"]
    if line["kernel"] == "_wgrad_selected":
        return 2 * (c["BP"] + c["BQ"]) * c["BR"]
    halves = 2 if line["kernel"] == "_up_swiglu_fwd" else 1
    return 2 * stages * (c["BM"] + halves * c["BN"]) * c["BK"]


def compiled(arch: str, cache: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Compile in a process that does not interpret; return the package's kernels and the lines."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "kernels"),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",  # the default, which Triton 3.9 warns of changing
    }
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, arch], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    first, *lines = map(json.loads, ran.stdout.splitlines())
    return set(first["kernels"]), lines

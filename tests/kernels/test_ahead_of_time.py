"""What a GPU would run: the kernels compiled for three architectures, none of which is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert {line["layout"] for line in lines} == {"plain", "interleaved", "generic"}
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
    # Tiles come to shared memory 16 bytes at a time; narrower copies are of row numbers.
    assert not [line for line in products if not line["wide_copies"] > line["narrow_copies"]]


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

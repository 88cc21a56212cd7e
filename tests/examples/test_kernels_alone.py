"""examples/kernels_alone.py, run as its first lines say, with esft out of reach."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_learns_without_esft(tmp_path):
    forbid = tmp_path / "esft.py"
    forbid.write_text("raise ImportError('esft_kernels needs no esft')\n", encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / "kernels_alone.py"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", ran.stdout)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert ran.stdout.endswith("trained 12,288 of 49,152 weights\n")

"""A run of `esft train` in a process of its own, and the most memory that it used.

The figure: the highest resident size (VmHWM) from the moment when the model has been loaded, or
when loading it in few bits begins, until the end of the run, less the resident size before it was
loaded and after a run of another model has brought in every library. glibc is told to give freed
blocks back at once, so that what is resident is what is allocated.

    python measured_run.py WARM_UP_RECIPE WARM_UP_OUT RECIPE OUT
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import esft
from esft.run import base_model

PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Set the peak back to what is resident."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    warm_up, warm_out, recipe, out = map(Path, sys.argv[1:])
    esft.train(warm_up, warm_out)
    gc.collect()
    before = resident("VmRSS")
    usual, in_few_bits = base_model.load_model, base_model.load_quantised

    def load_model(*args: Any, **options: Any) -> Any:
        model = usual(*args, **options)
        forget_peak()
        return model

    def load_quantised(*args: Any, **options: Any) -> Any:
        forget_peak()
        return in_few_bits(*args, **options)

    base_model.load_model, base_model.load_quantised = load_model, load_quantised
    result = esft.train(recipe, out)
    print(json.dumps({"peak": resident("VmHWM") - before, "trained": result.trained}))


if __name__ == "__main__":
    main()

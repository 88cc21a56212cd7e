"""A run of `esft train` in a process of its own, and the most memory that it used.

The figure: the highest resident size (VmHWM) from the moment when the model has been loaded until
the end of the run, less the resident size before it was loaded and after a run of another model has
brought in every library. glibc is told to give freed blocks back at once, so that what is resident
is what is allocated.

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
from esft import training

PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    warm_up, warm_out, recipe, out = map(Path, sys.argv[1:])
    esft.train(warm_up, warm_out)
    gc.collect()
    before = resident("VmRSS")
    usual = training.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        model = usual(*args, **options)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident
        return model

    training.load_model = load_model
    result = esft.train(recipe, out)
    print(json.dumps({"peak": resident("VmHWM") - before, "trained": result.trained}))


if __name__ == "__main__":
    main()

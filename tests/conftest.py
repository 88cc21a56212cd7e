"""What must be so before any test imports anything."""

import gc
import os
from collections.abc import Iterator

import pytest

# Here, where pytest looks for it in the process that prints, also with -n.
from tests.faults.counts import pytest_terminal_summary as pytest_terminal_summary

# Triton's interpreter runs the kernels without a GPU; Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_is_new() -> Iterator[None]:
    """Keep the garbage collector from the libraries' objects: each training run calls it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

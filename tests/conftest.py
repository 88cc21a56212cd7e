"""What must be so before any test imports anything."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

# Here, where pytest looks for it in the process that prints, also with -n.
from tests.faults.counts import pytest_terminal_summary as pytest_terminal_summary

# Triton's interpreter runs the kernels without a GPU; Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "1"

# A background job of a shell ignores SIGINT; what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_is_new() -> Iterator[None]:
    """Keep the garbage collector from the libraries' objects: each training run calls it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

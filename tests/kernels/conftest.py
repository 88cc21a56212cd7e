"""What holds for every test of the kernels: few programs, and no stray reads or writes."""

from collections.abc import Iterator

import pytest
from guarded_memory import GuardedMemory
from triton.runtime.interpreter import interpreter_builder

MOST_PROGRAMS = 100
"""Of one test: the interpreter takes 10 to 20 ms for each, whatever the size of its tile."""


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Count the programs that Triton's interpreter runs."""
    ran: list[tuple[int, int, int]] = []
    begin = interpreter_builder.set_grid_idx

    def note(x: int, y: int, z: int) -> None:
        ran.append((x, y, z))
        begin(x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", note)
    yield ran
    assert len(ran) <= MOST_PROGRAMS


@pytest.fixture
def guarded() -> Iterator[GuardedMemory]:
    """Allocate as `GuardedMemory` does, and look at the guards when the test is over."""
    with GuardedMemory() as memory:
        yield memory
    memory.check()

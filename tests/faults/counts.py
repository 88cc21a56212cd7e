"""The fault matrix, and the count of its cases that is printed after the tests."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# The table's numbers of cases; `more` are cases of the same faults in files that it does not name.
TABLE = {
    "R1": 48,
    "R2": 20,
    "R3": 8,
    "R4": 4,
    "R5": 8,
    "R6": 4,
    "S1": 16,
    "S2": 10,
    "S3": 8,
    "S4": 4,
    "S5": 10,
    "S6": 6,
    "S7": 1,
    "I1": 8,
    "I2": 4,
    "I3": 4,
    "I4": 6,
    "D1": 12,
    "D2": 14,
    "D3": 72,
    "D4": 6,
    "N1": 6,
    "N2": 8,
    "N3": 3,
    "N4": 8,
    "N5": 16,
    "N6": 16,
    "N7": 104,
    "E1": 24,
    "E2": 6,
    "E3": 4,
    "E4": 6,
    "E5": 6,
    "X1": 6,
    "X2": 4,
    "X3": 2,
    "X4": 7,
    "X5": 4,
    "more": 34,
}
LONG = ("R1", "R2", "E1")  # of which `make test` runs a part: each case trains twice
_CASE = re.compile(r"tests/faults/test_\w+\.py::test_([a-z]\d|more)_")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many cases of each kind ran, and why any was skipped."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in TABLE}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if case := _CASE.match(getattr(report, "nodeid", "")):
                name = case[1] if case[1] == "more" else case[1].upper()
                counts[name][outcome] += 1
                if outcome == "skipped":
                    terminalreporter.line(f"skipped {report.nodeid}: {report.longrepr[-1]}")
    if not any(counts.values()):
        return
    terminalreporter.section("fault matrix")
    for name, count in counts.items():
        left_out = TABLE[name] - count.total()
        why = f"; {left_out} left out for time, make faults runs them" * (name in LONG)
        terminalreporter.line(
            f"{name:>5}: {_words(count)}, {TABLE[name]} in the table{why if left_out else ''}"
        )
    total = sum(counts.values(), Counter())
    terminalreporter.line(f"total: {total.total()} cases, {_words(total)}")


def _words(count: Counter[str]) -> str:
    return ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))

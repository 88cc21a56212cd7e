"""The CSV file of gpu.py, written row by row."""

from __future__ import annotations

import csv
from typing import IO, Any

from floor import Work
from gpu_setting import middle

COLUMNS = (
    "kind", "model", "tokens", "routing", "share", "selected", "row_share", "name", "phase",
    "ms", "lowest", "highest", "floor_ms", "percent_of_floor", "gflop", "mbyte",
    "error", "bound", "note",
)  # fmt: skip


class Rows:
    """Writes rows to a file and to the terminal, each as soon as it is known."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._writer = csv.DictWriter(file, COLUMNS)
        self._writer.writeheader()

    def add(self, kind: str, **columns: Any) -> None:
        """Write a row; columns that are not given stay empty."""
        shown = {
            key: f"{value:.5g}" if isinstance(value, float) else value
            for key, value in columns.items()
        }
        self._writer.writerow({"kind": kind, **shown})
        self._file.flush()
        print(kind, *(value for value in shown.values() if value != ""), flush=True)

    def timed(
        self, kind: str, times: list[float], floor: float, work: Work | None = None, **columns: Any
    ) -> None:
        """Write a row of times and of a floor, all in ms."""
        ms = middle(times)
        if work:
            columns |= {"gflop": work.flops / 1e9, "mbyte": work.bytes / 1e6}
        self.add(
            kind,
            **columns,
            ms=ms,
            lowest=min(times),
            highest=max(times),
            floor_ms=floor,
            percent_of_floor=100 * floor / ms,
        )

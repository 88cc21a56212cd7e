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


OURS = "esft triton"
OTHERS = (
    "grouped_mm full", "grouped_mm frozen", "grouped_mm prefix dW", "esft grouped",
    "transformers full", "transformers frozen",
)  # fmt: skip


class Rows:
    """Writes rows to a file and to the terminal, each as soon as it is known."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._writer = csv.DictWriter(file, COLUMNS)
        self._writer.writeheader()
        self._steps: list[dict[str, Any]] = []

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
        columns |= {"ms": ms, "lowest": min(times), "highest": max(times)}
        columns |= {"floor_ms": floor, "percent_of_floor": 100 * floor / ms}
        self.add(kind, **columns)
        if columns.get("phase") == "step":
            self._steps.append(columns)

    def summary(self) -> str:
        """Return a Markdown table of our steps: times over the floor, and others' over ours."""
        header = [
            "layer", "tokens", "routing", "share of rows", "n", "ours, ms", "ours / floor",
            *(f"{name} / ours" for name in OTHERS),
        ]  # fmt: skip
        lines = [header, ["---"] * len(header)]
        for ours in self._steps:
            if ours["name"] != OURS:
                continue
            layer = [ours[key] for key in ("model", "tokens", "routing")]
            # Layers that do not depend on a share have 0 there.
            other = {
                step["name"]: step["ms"] / ours["ms"]
                for step in self._steps
                if [step[key] for key in ("model", "tokens", "routing")] == layer
                and step["share"] in (0, ours["share"])
            }
            ratios = [ours["ms"] / ours["floor_ms"], *(other[name] for name in OTHERS)]
            lines.append(
                [
                    *layer,
                    f"{100 * ours['row_share']:.1f} %",
                    str(ours["selected"]),
                    f"{ours['ms']:.2f}",
                    *(f"{ratio:.2f}" for ratio in ratios),
                ]
            )
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

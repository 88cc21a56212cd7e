"""The picture of overlaps: a readable PNG of sensible size, colours where they belong."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from esft.errors import OutputError
from esft.overlap import Overlap
from esft.report.overlap_map import draw_overlap

DARKEST = np.array([0x08, 0x30, 0x6B]) / 255  # of the colours: an overlap of 1


def found(tasks: int, layers: int, between: float) -> Overlap:
    square = [[1.0 if a == b else between for b in range(tasks)] for a in range(tasks)]
    names = [f"task {number}" for number in range(tasks)]
    return Overlap(names, square, dict.fromkeys(range(1, layers + 1), square), [5] * tasks)


@pytest.mark.parametrize(("tasks", "layers"), [(2, 1), (3, 26), (8, 4), (5, 61)])
def test_every_size_gives_a_picture_of_sensible_size(
    tmp_path: Path, tasks: int, layers: int
) -> None:
    draw_overlap(found(tasks, layers, 0.3), tmp_path / "map.png", title="Tasks")
    height, width, _ = matplotlib.image.imread(tmp_path / "map.png").shape
    assert 200 < height < 2500
    assert 500 < width < 5000


def test_dark_cells_are_those_that_overlap(tmp_path: Path) -> None:
    dark = []
    for between in (0.0, 1.0):
        draw_overlap(found(3, 4, between), tmp_path / "map.png")
        pixels = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
        dark.append(int((np.abs(pixels - DARKEST).max(axis=-1) < 0.02).sum()))
    # The diagonal alone, 3 of 9 cells; then all of them, and 3 pairs in 4 layers.
    assert dark[0] > 1000
    assert dark[1] > 4 * dark[0]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        draw_overlap(found(2, 1, 0.5), tmp_path / "file" / "map.png")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]

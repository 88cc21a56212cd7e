"""The expert heat map: a readable PNG, drawn without a display, outlines where they belong."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from esft.errors import OutputError, SelectionError
from esft.report.heatmap import draw_heatmap
from esft.scores import LayerScores, Scores
from esft.selection import Selection

OUTLINE = np.array([0xD5, 0x5E, 0x00]) / 255


def scores(experts: int, layers: int) -> Scores:
    row = [0.1 + 0.9 * (expert == 2) for expert in range(experts)]
    return Scores(
        {index: LayerScores(experts, 1, 10, row, row) for index in range(1, layers + 1)},
        sample={"data": "tasks/clock/train.jsonl"},
    )


def outlined(path: Path) -> int:
    """Count pixels in the outline's colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return int((np.abs(pixels - OUTLINE).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize(("experts", "layers"), [(4, 1), (8, 3), (64, 26), (128, 48), (256, 5)])
def test_every_size_gives_a_picture_of_sensible_size(
    tmp_path: Path, experts: int, layers: int
) -> None:
    draw_heatmap(scores(experts, layers), tmp_path / "map.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "map.png").shape
    assert 200 < height < 2000
    assert 600 < width < 5000


def test_selected_experts_are_outlined(tmp_path: Path) -> None:
    counts = []
    for name, experts in (("none", None), ("one", {1: [0]}), ("three", {1: [0, 5], 3: [3]})):
        selection = Selection(experts) if experts else None
        draw_heatmap(scores(8, 3), tmp_path / f"{name}.png", selection=selection)
        counts.append(outlined(tmp_path / f"{name}.png"))
    assert counts[0] == 0
    assert counts[1] > 200
    assert 2.5 < counts[2] / counts[1] < 3.5


def test_layers_may_differ(tmp_path: Path) -> None:
    mixed = Scores(
        {0: LayerScores(2, 1, 1, [0.5, 0.5], [0.5, 0.5]), 7: scores(8, 1).layers[1]},
    )
    draw_heatmap(mixed, tmp_path / "map.png", selection=Selection({0: [1], 7: [7]}), metric="gate")
    assert outlined(tmp_path / "map.png") > 0


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="expert 9 in layer 1"):
        draw_heatmap(scores(8, 1), tmp_path / "map.png", selection=Selection({1: [9]}))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        draw_heatmap(scores(8, 1), tmp_path / "file" / "map.png")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]

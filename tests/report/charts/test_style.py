"""Colours that can be seen, and methods that can be told apart, by formulas of their own."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import numpy as np

from esft.report.charts.canvas import canvas
from esft.report.charts.cells import draw_cells
from esft.report.charts.style import (
    DARK,
    INK,
    MUTED,
    ON_PALE,
    ON_STRONG,
    OUTLINE,
    SURFACE,
    blues,
    changes,
    line_styles,
)

# What eyes without one kind of cone see (Machado, Oliveira and Fernandes 2009, severity 1).
PROTAN = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
DEUTAN = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]
TWELVE = [f"method {place}" for place in range(12)]


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b*, of linear sRGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ rgb / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_lines_and_letters_stand_out() -> None:
    for line in line_styles(TWELVE).values():
        assert contrast(line.colour, SURFACE) >= 3
        assert contrast(DARK[line.colour], DARK[SURFACE]) >= 3
    for letters in (INK, MUTED):
        assert contrast(letters, SURFACE) >= 4.5
        assert contrast(DARK[letters], DARK[SURFACE]) >= 4.5


def test_each_colour_stands_for_one_role() -> None:
    lines = [line.colour for line in line_styles(TWELVE).values()]
    roles = [*lines, INK, MUTED, ON_PALE, ON_STRONG, SURFACE, *blues(), *changes()]
    assert len(set(roles)) == len(roles)
    assert all(role in DARK for role in roles)
    assert OUTLINE in lines  # the same accent
    assert len({DARK[colour] for colour in lines}) == 12


def test_twelve_methods_differ_in_marker_and_more() -> None:
    styles = line_styles(TWELVE)
    assert len({line.marker for line in styles.values()}) == 12
    for one, other in combinations(list(styles.values()), 2):
        for shade in (lambda colour: colour, DARK.__getitem__):
            rgb = [linear(shade(line.colour)) for line in (one, other)]
            for view in (np.eye(3), np.array(PROTAN), np.array(DEUTAN)):
                a, b = (lab(np.clip(view @ value, 0, 1)) for value in rgb)
                # 2.3 is a difference that is just noticed; where colours are near, dashes differ.
                near = np.linalg.norm(a - b)
                assert near > 5 or one.dashes != other.dashes
    neighbours = list(styles.values())[:6]
    for one, other in combinations(neighbours, 2):
        assert np.linalg.norm(lab(linear(one.colour)) - lab(linear(other.colour))) > 25


def test_more_methods_than_colours_differ_in_dashes() -> None:
    styles = line_styles([str(place) for place in range(40)])
    assert len({(line.colour, line.marker, line.dashes) for line in styles.values()}) == 40
    assert styles["0"].colour == styles["12"].colour


def test_cells_grow_darker_or_lighter_with_their_value() -> None:
    for shade, sign in ((lambda colour: colour, -1), (DARK.__getitem__, 1)):
        rising = [sign * luminance(shade(colour)) for colour in blues()]
        assert rising == sorted(rising)
        middle = len(changes()) // 2
        for half in (changes()[middle:], changes()[middle::-1]):
            away = [sign * luminance(shade(colour)) for colour in half]
            assert away == sorted(away)


def test_numbers_on_cells_can_be_read() -> None:
    values = np.linspace(0, 1, 49)
    with canvas("cells", "Cells", []) as (picture, (axes,)):
        draw_cells(axes, values.reshape(7, 7), blues(), (0.0, 1.0), numbers=True)
        root = ElementTree.fromstring(picture.chart("").svg)
    letters = [
        re.findall("fill: (#......)", element.attrib["style"])[0]
        for element in root.iter("{http://www.w3.org/2000/svg}text")
        if re.fullmatch(r"\d\.\d\d", element.text or "")
    ]
    assert len(letters) == 49
    assert len(set(letters)) == 2
    for value, letter in zip(values, letters, strict=True):
        cell = blues()[min(int(value * len(blues())), len(blues()) - 1)]
        assert contrast(letter, cell) >= 4.5, value
        assert contrast(DARK[letter], DARK[cell]) >= 4.5, value

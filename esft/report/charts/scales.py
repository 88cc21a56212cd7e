"""Axes' numbers in few letters: bytes, counts, and the values of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def short(value: float, unit: str = "") -> str:
    """Return a number with a decimal prefix, three digits at most: 1.5 M, 400 k, 0.05."""
    size, prefix = float(value), 0
    while abs(size) >= 999.5 and prefix + 1 < len(_PREFIXES):
        size, prefix = size / 1000, prefix + 1
    return f"{size:.3g} {_PREFIXES[prefix]}{unit}".rstrip()


def bytes_axis(axes: Axes) -> None:
    """Label the logarithmic axis below with bytes, at least two of them."""
    _logarithmic(axes.xaxis, "B")


def counts_axis(axes: Axes) -> None:
    """Label the axis at the left with short numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if axes.get_yscale() == "log":
        _logarithmic(axes.yaxis, "")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def value_axis(axes: Axes, values: Sequence[float], form: str | None = None) -> None:
    """Put the axis below on the values of a sweep: a tick each, logarithmic where they span.

    Args:
        axes: whose.
        values: rising.
        form: as `format` takes it, instead of short numbers.
    """
    from matplotlib.ticker import NullLocator

    if min(values) > 0 and max(values) / min(values) >= 4:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    shown = list(values)
    while len(shown) > 8:
        shown = shown[::2]
    axes.set_xticks(shown, [format(value, form) if form else short(value) for value in shown])


def whole_axis(axes: Axes) -> None:
    """Put whole numbers only on the axis below, as for layers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def _logarithmic(axis: Axis, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = high / low if low > 0 else 1.0
    subs: tuple[float, ...] = (
        (1.0,) if decades > 300 else (1.0, 3.0) if decades > 20 else (1.0, 2.0, 5.0)
    )
    if decades < 4:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value, unit)))
    axis.set_minor_formatter(NullFormatter())

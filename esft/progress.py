"""Progress of long work, told to whoever listens: a terminal, a log, or nobody."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from esft.secrets import redact


class Reporter(Protocol):
    """Listens to long work. A library function takes one and defaults to `SILENT`."""

    def note(self, text: str) -> None:
        """Say one line."""

    def task(self, title: str, total: int, unit: str) -> Task:
        """Open a task of `total` units ("step", "token"); use it in a `with` statement."""


class Task:
    """One piece of long work. Does nothing itself; reporters override `advance`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def advance(self, units: int = 1, tokens: int = 0, **figures: float) -> None:
        """Count `units` done, `tokens` processed; `figures` are shown beside (loss=...)."""

    def close(self) -> None:
        """End the task."""


class SilentReporter:
    """Drops everything."""

    def note(self, text: str) -> None:
        """Drop a line."""

    def task(self, title: str, total: int, unit: str) -> Task:
        """Open a task that nobody watches."""
        return Task()


SILENT = SilentReporter()


class ConsoleReporter:
    """Shows progress on stderr: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Stderr(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(redact(text), markup=False, soft_wrap=True)

    def task(self, title: str, total: int, unit: str) -> Task:
        """Open a bar, or a task that prints lines where there is no terminal."""
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            return _BarTask(self.console, title, total)
        return _LineTask(self.console, title, total, unit)


class _Stderr(Console):
    """Goes on where rich would exit: a run must not end because nobody watches it any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


class _Speed:
    """Tokens per second since the task began."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tokens = 0

    def text(self, figures: dict[str, float]) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        parts = [f"{name} {value:.3g}" for name, value in figures.items()]
        if self.tokens:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        return ", ".join(parts)


class _BarTask(Task):
    def __init__(self, console: Console, title: str, total: int) -> None:
        self._speed = _Speed()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._id = self._bar.add_task(title, total=total, figures="")
        self._bar.start()

    def advance(self, units: int = 1, tokens: int = 0, **figures: float) -> None:
        self._speed.tokens += tokens
        self._bar.update(self._id, advance=units, figures=self._speed.text(figures))

    def close(self) -> None:
        self._bar.stop()


class _LineTask(Task):
    _EVERY = 10.0  # seconds between lines

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self._console = console
        self._title, self._total, self._unit = title, total, unit
        self._speed = _Speed()
        self._done = 0
        self._last = time.monotonic()
        self._figures: dict[str, float] = {}

    def advance(self, units: int = 1, tokens: int = 0, **figures: float) -> None:
        self._done += units
        self._speed.tokens += tokens
        self._figures = figures or self._figures
        if time.monotonic() - self._last >= self._EVERY:
            self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        left = ""
        if 0 < self._done < self._total:
            elapsed = time.monotonic() - self._speed.start
            left = f", {elapsed / self._done * (self._total - self._done):,.0f} s left"
        speed = self._speed.text(self._figures)
        line = f"{self._title}: {self._done:,}/{self._total:,} {self._unit}s"
        line += (f", {speed}" if speed else "") + left
        self._console.print(line, markup=False, soft_wrap=True)

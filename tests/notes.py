"""A reporter that keeps what it is told."""

from __future__ import annotations

from esft.progress import SilentReporter


class Notes(SilentReporter):
    """Keeps its notes and shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

"""SIGINT and SIGTERM: the first ends a run at a good moment, the second at once.

Of several processes a signal may reach one alone. They agree on it, so that all stop after the same
step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from signal import Signals
from types import FrameType

from esft import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run was ended by a signal.

    A program that does not catch it ends silently with `code`: 128 plus the signal's number, 130
    or 143. Not an `Exception`, so that no library in between takes it for a failure of its own.

    Attributes:
        signal: which one came first.
        message: says how to go on; empty until `train` knows.
    """

    def __init__(self, number: Signals, message: str = "") -> None:
        super().__init__(128 + number)
        self.signal, self.message = number, message

    def __str__(self) -> str:
        return self.message or f"interrupted by {self.signal.name}"


class Interruption:
    """What came in while handlers were installed. See `interruptible`.

    Attributes:
        came: the first signal that came to this process.
    """

    def __init__(self) -> None:
        self.came: Signals | None = None
        self._agreed: Signals | None = None
        self._waits = False
        self._process = os.getpid()

    @property
    def signal(self) -> Signals | None:
        """The first signal; of several processes one that all know of, see `agree`."""
        return self.came if processes.count() == 1 else self._agreed

    def agree(self, found: Iterable[Signals | None] | None = None) -> None:
        """Let all processes know of a signal that came to one of them; all must call this.

        Args:
            found: what came to each process, where they have told each other already.
        """
        if found is None:
            found = processes.gathered(self.came, "train") if processes.count() > 1 else ()
        self._agreed = self._agreed or next((came for came in found if came is not None), None)

    def heed(self) -> None:
        """End all processes if a signal came to one of them; all must call this.

        Raises:
            Interrupted: one came.
        """
        self.agree()
        if self.signal is not None:
            raise Interrupted(self.signal)

    @contextlib.contextmanager
    def at_a_good_moment(self) -> Iterator[None]:
        """Let the first signal wait: the block looks at `signal` and raises `Interrupted` itself.

        Outside of such a block a signal raises `Interrupted` where the program is. So does the
        first one that came within, when the block ends.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.heed()

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note a signal, or act on it."""
        if os.getpid() != self._process:
            # In a data loader's process: Ctrl-C goes to all, and the step needs its rows.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.came is None:
            self.came = Signals(number)
            if self._waits:
                return
        else:
            # Should even cleaning up take too long, one more signal ends the process.
            for each in _SIGNALS:
                if signal.getsignal(each) == self.handle:
                    signal.signal(each, signal.SIG_DFL)
        raise Interrupted(self.came)


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Catch SIGINT and SIGTERM within the block; the handlers that were there come back after it.

    Outside the main thread, where Python cannot, nothing is caught; nor is a signal that whoever
    started the process had it ignore (`nohup`, a shell's background job).
    """
    interruption = Interruption()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            # None: installed by C code, which could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, interruption.handle)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

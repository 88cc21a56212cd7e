"""A thread that fetches experts while the model computes: what is needed before what is guessed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Loader(Generic[Key, Value]):
    """Runs `load(key)` for keys asked for, one at a time, in a thread of its own.

    One thread: several would fight over one disk, or one bus.
    """

    def __init__(self, load: Callable[[Key], Value]) -> None:
        self._load = load
        self._awake = threading.Condition()
        self._queues: dict[bool, deque[tuple[Key, Future[Value]]]] = {True: deque(), False: deque()}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="esft-experts", daemon=True)
        self._thread.start()

    def fetch(self, key: Key, *, urgent: bool) -> Future[Value]:
        """Ask for a key; urgent ones go first. `Future.cancel` takes back what has not begun."""
        future: Future[Value] = Future()
        with self._awake:
            self._queues[urgent].append((key, future))
            self._awake.notify()
        return future

    def hurry(self, key: Key, future: Future[Value]) -> None:
        """Let what was asked for as not urgent go first, if it has not begun."""
        with self._awake:
            if (key, future) in self._queues[False]:
                self._queues[False].remove((key, future))
                self._queues[True].append((key, future))

    def close(self) -> None:
        """Take back what has not begun, and wait for what has."""
        with self._awake:
            self._closed = True
            for queue in self._queues.values():
                for _, future in queue:
                    future.cancel()
                queue.clear()
            self._awake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._awake:
                while not self._closed and not any(self._queues.values()):
                    self._awake.wait()
                if self._closed:
                    return
                key, future = (self._queues[True] or self._queues[False]).popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._load(key))
            except Exception as error:  # told to whoever asks for the result
                future.set_exception(error)
            del future

"""Merge in processes that are stopped at a given moment and then killed from outside.

Run as a script: `killed_merge.py BASE DELTA OUT MOMENT...` prints, as JSON, what each left. What
Python itself reports of a process's doings (its audit events: files opened, renames) tells the
moments, so that they do not depend on how merging is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esft.merging import merge


def watch(out: Path, see: Callable[[str], None]) -> None:
    """Call `see` with "write", "sync" or "rename" just before this process does it beside `out`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename") or not str(arguments[0]).startswith(str(out.parent)):
            return
        if event == "os.rename":
            see("rename" if str(arguments[1]) == str(out) else "write")
        else:
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            see("write" if writes else "sync")

    sys.addaudithook(hook)


def events_of(base: Path, delta: Path, out: Path) -> list[str]:
    """Merge undisturbed in another process and return what `watch` saw there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        watch(out, lambda event: os.write(writer, f"{event}\n".encode()) and None)
        merge(base, delta, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as events:
        seen = events.read().split()
    assert os.waitpid(child, 0)[1] == 0
    return seen


def kill_at(base: Path, delta: Path, out: Path, number: int) -> int:
    """Merge in another process, which stops before an event; kill it; return the signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def see(_: str) -> None:
            nonlocal count
            if count == number:
                os.write(writer, b".")
                while True:
                    time.sleep(60)
            count += 1

        watch(out, see)
        merge(base, delta, out)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.kill(child, signal.SIGKILL)
    os.close(reader)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def main(base: Path, delta: Path, out: Path, moments: list[str]) -> None:
    out.parent.mkdir(exist_ok=True)
    events = events_of(base, delta, out)
    found: dict[str, Any] = {"undisturbed": content(out)}
    writes = [number for number, event in enumerate(events) if event == "write"]
    syncs = [n for n, event in enumerate(events) if event == "sync" and n > writes[-1]]
    numbers = {
        "at its first file": writes[0],
        "at its second file": writes[1],
        "in the middle": writes[len(writes) // 2],
        "at its last file": writes[-1],
        "while it is synced": syncs[len(syncs) // 2],
        "before it is renamed": events.index("rename"),
    }
    for moment in moments:
        shutil.rmtree(out)
        signalled = kill_at(base, delta, out, numbers[moment])
        found[moment] = {"signal": signalled, "out_exists": out.exists()}
        merge(base, delta, out)
        found[moment]["merged_again"] = content(out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])

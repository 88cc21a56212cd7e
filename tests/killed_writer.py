"""Run a writer again and again, killed at each line that it executes in esft/files.py.

Run as a script: `killed_writer.py WHAT FOLDER` prints, as JSON, what a reader finds after each.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from esft import files

OLD, NEW = "old " * 5000, "new " * 9000


def write_file(folder: Path) -> None:
    files.write_text(folder / "out", NEW)


def write_folder(folder: Path) -> None:
    with files.new_folder(folder / "out", replace=True) as inside:
        for name in ("a", "b/c"):
            files.write_text(inside / name, NEW)


def old_file(folder: Path) -> None:
    (folder / "out").write_text(OLD)


def old_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "a").write_text(OLD)


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "file": (old_file, write_file),
    "new file": (lambda folder: None, write_file),
    "folder": (old_folder, write_folder),
    "new folder": (lambda folder: None, write_folder),
}


def kill_at_line(number: int) -> None:
    """Make this process kill itself before the given line, counted in esft/files.py only."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def found(folder: Path) -> Any:
    """What a reader sees: names without a leading dot, and which text each file holds."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            seen[str(name)] = {OLD: "old", NEW: "new"}.get(path.read_text(), "torn")
    return seen


def main(what: str, folder: Path) -> None:
    prepare, write = CASES[what]
    states: list[Any] = []
    status = -1
    while status:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        prepare(folder)
        child = os.fork()
        if child == 0:
            kill_at_line(len(states))
            write(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        states.append(found(folder))
    print(json.dumps(states))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

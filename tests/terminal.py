"""Runs the `esft` command with a real terminal, pipe or closed stream as its output.

In a fork of this process, which has imported what the command needs. Only for commands that train
nothing: autograd's threads do not live on in a fork.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch
from esft_cli import main
from transformers.utils.logging import disable_progress_bar

from tests.command import Argument

WIDTH = 40
# What tells a terminal's abilities, and must come from the case alone.
_ABOUT_TERMINALS = (
    "TERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLORTERM",
    "PYTHONUTF8",
)


@dataclass
class Shown:
    """How a command ended and what came out of its streams.

    Attributes:
        code: its exit code.
        out: standard output.
        err: standard error.
    """

    code: int
    out: str = ""
    err: str = ""


def esft_in_terminal(*arguments: Argument, columns: int = WIDTH, **environment: str) -> Shown:
    """Run `esft ARGUMENTS` with a terminal of its own as standard output, another as error."""
    ends = [pty.openpty() for _ in range(2)]
    size = struct.pack("HHHH", 24, columns, 0, 0)
    for _, inner in ends:
        fcntl.ioctl(inner, termios.TIOCSWINSZ, size)
    return _run(arguments, ends, {"TERM": "xterm-256color"} | environment)


def esft_in_pipe(*arguments: Argument, readers_gone: str = "", **environment: str) -> Shown:
    """Run `esft ARGUMENTS` with pipes; nobody reads those named ("out", "err" or both)."""
    ends = [os.pipe() for _ in range(2)]
    for (reader, _), name in zip(ends, ("out", "err"), strict=True):
        if name in readers_gone:
            os.close(reader)
    return _run(arguments, ends, environment, readers_gone)


def _run(
    arguments: tuple[Argument, ...],
    ends: list[tuple[int, int]],
    environment: dict[str, str],
    gone: str = "",
) -> Shown:
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, [inner for _, inner in ends], environment)
    found: dict[str, bytes] = {}

    def read(name: str, end: int) -> None:
        parts = []
        with suppress(OSError):  # a terminal whose other end is closed says so in this way
            while part := os.read(end, 65536):
                parts.append(part)
        os.close(end)
        found[name] = b"".join(parts)

    threads = []
    for name, (outer, inner) in zip(("out", "err"), ends, strict=True):
        os.close(inner)
        if name not in gone:
            threads.append(threading.Thread(target=read, args=(name, outer)))
            threads[-1].start()
    for thread in threads:
        thread.join()
    _, status = os.waitpid(child, 0)
    texts = {name: data.decode().replace("\r\n", "\n") for name, data in found.items()}
    return Shown(os.waitstatus_to_exitcode(status), **texts)


def _be_the_command(
    arguments: tuple[Argument, ...], streams: list[int], environment: dict[str, str]
) -> NoReturn:
    code = 99
    try:
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        for name in _ABOUT_TERMINALS:
            os.environ.pop(name, None)
        os.environ.update(environment)
        sys.argv = ["esft", *map(str, arguments)]
        code = _code_of_run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _code_of_run() -> int:
    signal.alarm(60)  # rather than wait for ever on a lock that the fork copied
    # A pool of threads does not live on in a fork, either; here one thread asks for a new one.
    torch.set_num_threads(torch.get_num_threads())
    # The command says so by a variable, before this module is imported.
    disable_progress_bar()
    try:
        main.run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

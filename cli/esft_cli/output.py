"""What commands print: tables for people on stdout, or one JSON object for machines."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table

from esft.progress import SILENT, ConsoleReporter, Reporter
from esft.report import numerals

_result_stream: ContextVar[TextIO | None] = ContextVar("result_stream", default=None)


@contextmanager
def _stdout_for_the_result() -> Iterator[None]:
    """Send to stderr what anything prints in the block, but for `print_json`."""
    token = _result_stream.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _result_stream.reset(token)


def _json(context: typer.Context, value: bool) -> bool:
    if value:  # for the rest of the command: libraries print, too
        context.with_resource(_stdout_for_the_result())
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_json,
        help="Print one JSON object on stdout; the rest goes to stderr.",
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, a hub id, or tiny-moe.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.", metavar="NAME")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, checkpoint, float32, bfloat16 or float16; auto: float32 on a CPU, the "
        "checkpoint's own on a GPU.",
        metavar="NAME",
    ),
]


def _trust(context: typer.Context, value: bool) -> bool:
    if value:
        from esft.locating import trusting_remote_code

        context.with_resource(trusting_remote_code())
    return value


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust,  # for the rest of the command; its function need not look
        help="Run the code that a checkpoint brings (auto_map); it can do whatever you can.",
    ),
]


def reporter() -> Reporter:
    """Return what shows progress and notes on stderr: of several processes, the first's alone."""
    from esft.processes import is_main

    return ConsoleReporter() if is_main() else SILENT


def console() -> Console:
    """Return a console on stdout; without a terminal it prints plain text, unwrapped."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=120)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; letters are escaped if its encoding may lack them."""
    stream = _result_stream.get() or sys.stdout
    encoding = stream.encoding or "utf-8"  # a text buffer has none and takes every letter
    ascii_only = codecs.lookup(encoding).name != "utf-8"
    print(json.dumps(value, ensure_ascii=ascii_only, allow_nan=False), file=stream)


def table(title: str, *columns: str) -> Table:
    """Return an empty table; columns whose name ends in `>` are right-aligned numbers."""
    result = Table(
        title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        right = column.endswith(">")
        # On a narrow terminal a cell goes on in the next line; rich would cut it.
        result.add_column(
            column.removesuffix(">"), justify="right" if right else "left", overflow="fold"
        )
    return result


def count(number: int | None) -> str:
    """Format a count: 12,345, or `?` where unknown."""
    return "?" if number is None else f"{number:,}"


def size(bytes_: int | None) -> str:
    """Format bytes with a decimal unit: 1.2 MB, or `?` where unknown."""
    return "?" if bytes_ is None else numerals.size(bytes_)


def share(part: float | None) -> str:
    """Format a share as a percentage: 6.6 %, or `?` where unknown."""
    return "?" if part is None else numerals.share(part)


def number_or_auto(text: str) -> float | str:
    """Parse an option that is a number or the word auto."""
    # A ValueError is a wrong use of the command, as for every other number.
    return text if text == "auto" else float(text)

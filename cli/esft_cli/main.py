"""The command's entry: the list of verbs, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from typing import NoReturn

import typer

from esft_cli.compare import compare
from esft_cli.data import app as data_app
from esft_cli.demo import demo
from esft_cli.evaluate import evaluate
from esft_cli.export import export
from esft_cli.generate import generate
from esft_cli.import_ import import_
from esft_cli.inspect import inspect
from esft_cli.mask import mask
from esft_cli.memory import keep_freed_memory
from esft_cli.merge import merge
from esft_cli.plan import plan
from esft_cli.profile import profile
from esft_cli.recipes import init, recipes
from esft_cli.report import report
from esft_cli.scores import app as scores_app
from esft_cli.select import select
from esft_cli.train import train
from esft_cli.unmerge import unmerge
from esft_cli.verify import verify

app = typer.Typer(
    name="esft",
    help="Specialise a Mixture-of-Experts language model by training only the experts a task uses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("recipes")(recipes)
app.command("init")(init)
app.command("inspect")(inspect)
app.command("profile")(profile)
app.command("select")(select)
app.command("plan")(plan)
app.command("train")(train)
app.command("compare")(compare)
app.command("merge")(merge)
app.command("verify")(verify)
app.command("unmerge")(unmerge)
app.command("export")(export)
app.command("import")(import_)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("mask")(mask)
app.command("report")(report)
app.add_typer(scores_app, name="scores")
app.add_typer(data_app, name="data")


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 the input is at fault, 2 usage, 3 a check failed.

    130: interrupted (typer sees to it). Errors of the user's are one line on stderr;
    `ESFT_TRACEBACK=1` shows where they were raised.
    """
    _open_closed_streams()
    _quiet_libraries()
    keep_freed_memory()
    _print_anything()
    from esft.errors import ElsewhereError, EsftError
    from esft.secrets import redact

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # while there is still somebody to tell what that raises
    except EsftError as error:
        if os.environ.get("ESFT_TRACEBACK"):
            raise
        if not isinstance(error, ElsewhereError):  # another process tells
            print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None:  # no stream, hence not for here to explain
            raise
        _end_without_output(error)


def _open_closed_streams() -> None:
    # Python has no object for a stream that its caller closed (`>&-`), and the first file that a
    # library opens would take its number and get what it prints.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w"))


def _end_without_output(error: OSError) -> NoReturn:
    # Nothing is to be told to who reads no more (`| head -1`); a full disk is.
    if error.errno != errno.EPIPE:
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
    # Python writes what is left when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _print_anything() -> None:
    # A letter that the terminal's encoding lacks is shown as its escape instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    # Before torch is imported: OpenMP threads that spin while waiting make two processes on two
    # cores tens of times slower than one thread each.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # esft reports progress and errors itself.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:  # news for developers of libraries, not for their users
        warnings.simplefilter("ignore", FutureWarning)

"""The command's entry: the list of verbs, and how errors become messages and exit codes."""

from __future__ import annotations

import io
import os
import sys
import warnings

import typer

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
from esft_cli.profile import profile
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
app.command("inspect")(inspect)
app.command("profile")(profile)
app.command("select")(select)
app.command("train")(train)
app.command("merge")(merge)
app.command("verify")(verify)
app.command("unmerge")(unmerge)
app.command("export")(export)
app.command("import")(import_)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("mask")(mask)
app.add_typer(scores_app, name="scores")
app.add_typer(data_app, name="data")


def run() -> None:
    """Run the command line. Exit codes: 0 done, 1 the input is at fault, 2 usage, 3 a check failed.

    130: interrupted (typer sees to it). Errors of the user's are one line on stderr;
    `ESFT_TRACEBACK=1` shows where they were raised.
    """
    _quiet_libraries()
    keep_freed_memory()
    _print_anything()
    from esft.errors import EsftError
    from esft.secrets import redact

    try:
        app()
    except EsftError as error:
        if os.environ.get("ESFT_TRACEBACK"):
            raise
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


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
    if not sys.warnoptions:  # news for developers of libraries, not for their users
        warnings.simplefilter("ignore", FutureWarning)

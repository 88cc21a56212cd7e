"""TensorBoard, Weights & Biases and Trackio, through the callbacks that transformers has for them.

What they write locally goes into the run's folder, unless their own environment variables say
otherwise. They are asked before any work whether they can log at all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esft.errors import EsftError, RecipeError, nearest
from esft.locating import first_line

REPORTERS = ("tensorboard", "wandb", "trackio")  # each also the name of its package
PROJECT = "esft"

_KEY = "training.report_to"


def reporters(training: dict[str, Any]) -> list[str]:
    """Return the reporters that a recipe's `training` section asks for, by name."""
    asked = training.get("report_to") or []
    names = [asked] if isinstance(asked, str) else list(asked)
    return [] if names == ["none"] else names


@contextlib.contextmanager
def reporting(training: dict[str, Any], out: Path) -> Iterator[None]:
    """Let a run inside the block report to what its recipe asks for, within its folder.

    Args:
        training: the recipe's `training` section.
        out: the run's folder; TensorBoard's files go to `tensorboard/` in it, those of Weights &
            Biases to `wandb/`, Trackio's to `trackio/`.

    Raises:
        RecipeError: one is unknown or not installed, or has nobody logged in; before the block.
        EsftError: one of them failed inside the block.
    """
    names = reporters(training)
    _check(names)
    if not names:
        yield
        return
    folder = out.resolve()
    places = {
        "TENSORBOARD_LOGGING_DIR": folder / "tensorboard",
        "TRACKIO_DIR": folder / "trackio",
        "WANDB_DIR": folder,
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
        "WANDB_PROJECT": training.get("project") or PROJECT,
    }
    before = {name: _open_run(name) for name in names}
    # They print to where `--json` prints its one object.
    with _environment(places), contextlib.redirect_stdout(sys.stderr):
        try:
            if "wandb" in names and not _offline():
                _log_in()
            yield
        except Exception as error:
            name = type(error).__module__.partition(".")[0]
            if name not in names:
                raise
            raise EsftError(f"{_KEY}: {name}: {first_line(error)}") from error
        finally:
            # transformers' callbacks leave runs open, and a next one would log into them.
            for name in names:
                if (run := _open_run(name)) is not None and run is not before[name]:
                    sys.modules[name].finish()


def _check(names: Iterable[str]) -> None:
    for name in names:
        if name not in REPORTERS:
            hint = nearest(name, REPORTERS) or f"; choose among {', '.join(REPORTERS)}"
            raise RecipeError(f"{_KEY}: {name}: not a reporter of esft's{hint}")
        if find_spec(name) is None:
            raise RecipeError(f"{_KEY}: {name} is not installed; pip install {name}")


def _offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")


def _log_in() -> None:
    import wandb

    try:
        wandb.login()  # asks on a terminal
    except wandb.errors.Error as error:
        raise RecipeError(
            f"{_KEY}: wandb: {str(error).splitlines()[0]} WANDB_MODE=offline logs into the run's "
            f"folder alone, for wandb sync"
        ) from error


def _open_run(name: str) -> Any:
    """Return the run that a reporter logs into at the moment, if there is one."""
    module: Any = sys.modules.get(name)
    if module is None or name == "tensorboard":
        return None
    return module.run if name == "wandb" else module.context_vars.current_run.get()


@contextlib.contextmanager
def _environment(values: dict[str, Path | str]) -> Iterator[None]:
    """Set environment variables that are not set already, inside the block."""
    added = {name: str(value) for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

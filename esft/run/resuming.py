"""Which checkpoint an interrupted run goes on from, and what its user is told."""

from __future__ import annotations

from pathlib import Path

from esft import processes
from esft.errors import EsftError, OutputError
from esft.files import remove_unfinished
from esft.progress import Reporter
from esft.recipe import read_recipe
from esft.recipe_sections import Recipe
from esft.run.checkpoint import SavedState, last, whole
from esft.run.folder import (
    CHECKPOINTS,
    DELTA,
    DIVERGED,
    METRICS,
    RECIPE,
    RESULT,
    is_complete,
)
from esft.run.guard import differences, recipe_identity
from esft.run.interruption import Interrupted


def to_resume(out: Path, recipe: Recipe, reporter: Reporter) -> SavedState | None:
    """Find what a run goes on from: the last checkpoint whose every hash is right.

    A damaged one is passed over with a note: from the one before it the run comes to the same bits.
    A run that was ended before its first checkpoint starts from the beginning. What a kill left
    half-written is deleted; the caller holds the run's lock.

    Args:
        out: the run's folder.
        recipe: with every default filled in.
        reporter: gets the notes.

    Raises:
        OutputError: the run is complete.
        CheckError: all of its checkpoints are damaged.
        EsftError: there is nothing to go on with.
    """
    if is_complete(out):
        raise OutputError(f"{out / DELTA}: this run is complete; there is nothing to resume")
    remove_unfinished(out)
    (out / RESULT).unlink(missing_ok=True)  # of a delta that was deleted since
    try:
        saved, damaged = whole(out / CHECKPOINTS)
    except LookupError:
        _check_begun(out, recipe)
        for leftover in (METRICS, DIVERGED):
            (out / leftover).unlink(missing_ok=True)
        reporter.note(f"{out}: no checkpoint yet; starting from the beginning")
        return None
    for line in damaged:
        reporter.note(f"{line}; going on from step {saved.step} instead")
    return saved


def explain_interruption(interrupted: Interrupted, out: Path) -> None:
    """Say in an interruption how to go on."""
    interrupted.message = f"{interrupted}; {how_to_go_on(out)}"


def how_to_go_on(out: Path) -> str:
    """Say what there is of a run that was ended, and how to go on with it."""
    if is_complete(out):
        return f"the run is complete: {out / DELTA}"
    saved = last(out / CHECKPOINTS)
    how = f"go on with: esft train {out / RECIPE} --out {out} --resume"
    if processes.count() > 1:
        how = f"go on as it was launched, with: {out / RECIPE} --out {out} --resume"
    if saved is not None:
        return f"step {saved.step} is saved; {how}"
    if (out / RECIPE).exists():
        return f"no step is saved; {how}"
    return "nothing was written yet"


def _check_begun(out: Path, recipe: Recipe) -> None:
    if not (out / RECIPE).is_file():
        raise EsftError(f"{out / CHECKPOINTS}: no complete checkpoint to resume from")
    changed = differences(recipe_identity(read_recipe(out / RECIPE)), recipe_identity(recipe))
    if changed:
        raise EsftError(
            f"{out}: cannot resume, the run has changed:\n"
            + "\n".join(changed)
            + "\nto start another run choose another --out"
        )

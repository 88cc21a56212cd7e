"""The whole job on the MoE that ships: profile, select, train, merge, check, score."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.data.encode import encode_rows
from esft.data.row import Row
from esft.data.rows import read_rows
from esft.errors import EsftError, OutputError, nearest
from esft.evaluation import Evaluation, evaluate_model
from esft.files import read_json, write_json
from esft.generation import generate_text
from esft.inference import load
from esft.locating import TINY_MOE, TINY_MOE_FOLDER
from esft.merging import Verification, merge, verify
from esft.profiling import profile
from esft.progress import SILENT, Reporter
from esft.recipe import make_recipe
from esft.report.heatmap import draw_heatmap
from esft.run.result import RunResult
from esft.selection import Selection, select
from esft.training import train

TASK = "dates"
STEPS = 200
P = 0.2
PROFILED_TOKENS = 16_384
LEARNING_RATE = 3e-3
SHOWN = 3  # test rows whose answers are shown
FORMAT = "esft-demo/1"
RESULT = "demo.json"
_WRITTEN = {RESULT, "scores.json", "selection.json", "experts.png", "run", "merged"}

TASKS = TINY_MOE_FOLDER / "tasks"
HELDOUT = TINY_MOE_FOLDER / "heldout"


@dataclass(frozen=True)
class Score:
    """How a model does on the task, and on what it was pretrained on.

    Attributes:
        task: on the task's test rows.
        general: held-out loss by pretraining domain, in nats a token.
        answers: prompt -> the model's answer, for a few test rows.
    """

    task: Evaluation
    general: dict[str, float]
    answers: dict[str, str]

    @property
    def general_loss(self) -> float:
        """Mean held-out loss over the domains, in nats a token."""
        return sum(self.general.values()) / len(self.general)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            **self.task.to_dict(),
            "general_loss": self.general_loss,
            "general_loss_by_domain": self.general,
            "answers": self.answers,
        }


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        task: name of the task.
        before: the base.
        after: the merged checkpoint.
        run: the training run.
        selection: the experts that were trained.
        verified: what was compared after merging.
        folder: where everything is.
        merged: the merged checkpoint.
        heatmap: the picture of the experts.
        seconds: of the whole demo.
    """

    task: str
    before: Score
    after: Score
    run: RunResult
    selection: Selection
    verified: Verification
    folder: Path
    merged: Path
    heatmap: Path
    seconds: float

    @property
    def share_of_experts(self) -> float:
        """Trained parameters as a share of the routed experts'."""
        return self.run.trained / self.run.routed

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "format": FORMAT,
            "task": self.task,
            "complete": True,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "run": self.run.to_dict(),
            "share_of_expert_parameters": self.share_of_experts,
            "verified": vars(self.verified),
            "folder": str(self.folder),
            "merged": str(self.merged),
            "heatmap": str(self.heatmap),
            "seconds": self.seconds,
        }


def demo(
    out: str | Path = "demo",
    *,
    task: str = TASK,
    steps: int = STEPS,
    reporter: Reporter = SILENT,
) -> DemoResult:
    """Specialise `tiny-moe` to a task that it does not know, from profile to merged checkpoint.

    Args:
        out: folder for everything; an earlier demo's is replaced.
        task: one of the tasks that ship, a folder name in `esft/tiny_moe/tasks`.
        steps: training steps.
        reporter: told of each verb, with the command that does the same.

    Raises:
        EsftError: there is no such task.
        OutputError: `out` is not empty and not an earlier demo, or the disk is full.
    """
    start = time.monotonic()
    out = Path(out)
    known = sorted(path.name for path in TASKS.iterdir())
    if task not in known:
        hint = nearest(task, known) or f"; there are {', '.join(known)}"
        raise EsftError(f"--task {task}: no such task{hint}")
    _clear(out)
    # From here on the folder is a demo's, even if this one is interrupted.
    write_json(out / RESULT, {"format": FORMAT, "task": task, "complete": False})
    data, test = TASKS / task / "train.jsonl", TASKS / task / "test.jsonl"
    run_folder, merged = out / "run", out / "merged"

    _say(reporter, f"eval {TINY_MOE} --data {test}", "The base does not know the task:")
    before = _score(TINY_MOE, test)
    _show(before, reporter)

    scores_file, selection_file = out / "scores.json", out / "selection.json"
    _say(
        reporter,
        f"profile {TINY_MOE} --data {data} --out {scores_file}",
        "Which experts does it use?",
    )
    scores = profile(TINY_MOE, data, tokens=PROFILED_TOKENS, reporter=reporter)
    scores.write(scores_file)

    selection = select(scores, metric="token", p=P)
    selection.write(selection_file)
    sizes = [len(ids) for ids in selection.experts.values()]
    _say(
        reporter,
        f"select {scores_file} --metric token --p {P} --out {selection_file}",
        f"{sum(sizes)} experts in {len(sizes)} layers, {min(sizes)} to {max(sizes)} each",
    )
    heatmap = out / "experts.png"
    draw_heatmap(scores, heatmap, selection=selection)

    recipe = make_recipe(
        {
            "model": TINY_MOE,
            "selection": str(selection_file),
            "data": {"train": str(data), "max_length": 256},
            "training": {
                "max_steps": steps,
                "per_device_train_batch_size": 8,
                "learning_rate": LEARNING_RATE,
                "seed": 0,
            },
        }
    )
    _say(
        reporter,
        f"train {run_folder / 'recipe.yaml'} --out {run_folder}",
        "Train these experts, freeze everything else:",
    )
    run = train(recipe, run_folder, reporter=reporter)

    _say(reporter, f"merge {TINY_MOE} {run.delta} --out {merged}", "An ordinary checkpoint:")
    merge(TINY_MOE, run.delta, merged)
    _say(
        reporter,
        f"verify {TINY_MOE} {run.delta} --merged {merged}",
        "Is it exactly base and delta?",
    )
    verified = verify(TINY_MOE, run.delta, merged)
    reporter.note(f"all {verified.merged} tensors are")

    _say(reporter, f"eval {merged} --data {test}", "And now:")
    after = _score(merged, test)
    _show(after, reporter)
    result = DemoResult(
        task=task,
        before=before,
        after=after,
        run=run,
        selection=selection,
        verified=verified,
        folder=out,
        merged=merged,
        heatmap=heatmap,
        seconds=time.monotonic() - start,
    )
    write_json(out / RESULT, result.to_dict())
    return result


def _say(reporter: Reporter, command: str, text: str) -> None:
    """Tell what is done next, with the command that does the same."""
    reporter.note(f"\n$ esft {command}\n{text}")


def _score(model: str | Path, test: Path) -> Score:
    loaded, tokenizer = load(model)

    def evaluated(rows: list[Row]) -> Evaluation:
        return evaluate_model(loaded, encode_rows(rows, tokenizer))

    rows = read_rows(test)
    return Score(
        task=evaluated(rows),
        general={
            file.stem: evaluated(read_rows(file)).loss for file in sorted(HELDOUT.glob("*.jsonl"))
        },
        answers={
            row.prompt: generate_text(loaded, tokenizer, row.prompt, max_new_tokens=32)
            for row in rows[:SHOWN]
            if row.prompt is not None
        },
    )


def _show(score: Score, reporter: Reporter) -> None:
    for prompt, answer in score.answers.items():
        reporter.note(f"  {prompt} {' '.join(answer.split())}")
    reporter.note(f"  exact match {100 * score.task.exact_match:.1f} %")


def _clear(out: Path) -> None:
    """Delete what an earlier demo wrote; refuse a folder with anything else in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: a file is in the way; choose another --out")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    if not _is_demo(out / RESULT) or found - _WRITTEN:
        other = min(found - _WRITTEN, default=RESULT)
        raise OutputError(f"{out}: {other} is not an earlier demo's; choose another --out")
    shutil.rmtree(out)


def _is_demo(file: Path) -> bool:
    try:
        value = read_json(file)
    except EsftError:
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT

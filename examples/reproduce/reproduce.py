"""The paper's comparison on the model that ships: runs it, and keeps what it found in `results/`.

python examples/reproduce/reproduce.py --jobs 2        # four tasks, three seeds: up to two hours
python examples/reproduce/reproduce.py why --jobs 2    # more steps, more experts: ten minutes
python examples/reproduce/reproduce.py --short         # one task, one seed: minutes; keeps nothing
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import esft
from esft.comparison.spec import as_compare_recipe
from esft.locating import TINY_MOE_FOLDER
from esft.progress import ConsoleReporter

HERE = Path(__file__).parent
SHORT = [
    "compare.tasks={dates: {train: 'tiny-moe:tasks/dates/train.jsonl', "
    "test: 'tiny-moe:tasks/dates/test.jsonl'}}",
    "compare.methods=[esft-token, random, lora, full]",
    "compare.learning_rates=[3.0e-3]",
    "compare.seeds=[0]",
    "training.max_steps=24",
    "training.eval_steps=12",
    "evaluation.max_rows=60",
    "evaluation.general_max_rows=4",
]


def main() -> None:
    """Run a comparison, write its report, and keep what is small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="compare", choices=["compare", "why"])
    parser.add_argument("--out", type=Path, help="build/reproduce-RECIPE unless given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--short", action="store_true", help="one task, one seed, a few steps")
    options = parser.parse_args()
    out = options.out or Path("build") / f"reproduce-{options.recipe}"
    file = HERE / f"{options.recipe}.yaml"
    recipe = as_compare_recipe(file, SHORT if options.short else [])
    esft.compare(recipe, out, jobs=options.jobs, reporter=ConsoleReporter())
    print(esft.write_report(out).html)
    if not options.short:
        keep(out, HERE / "results" / options.recipe)


def keep(out: Path, results: Path) -> None:
    """Keep what every run measured, and the report as Markdown; its links lead to the runs."""
    report = esft.write_report(out, results)
    report.html.unlink()
    shutil.copyfile(out / "comparison.json", results / "comparison.json")
    for file in (report.markdown, results / "comparison.json"):
        text = file.read_text(encoding="utf-8")  # where this machine has the model is no result
        file.write_text(text.replace(f"{TINY_MOE_FOLDER}/", "tiny-moe:"), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The paper's comparison on the model that ships: runs it, and keeps what it found in `results/`.

python examples/reproduce/reproduce.py --jobs 2     # four tasks, three seeds: up to two hours
python examples/reproduce/reproduce.py --short      # one task, one seed: minutes; keeps nothing
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import esft
from esft.comparison.spec import as_compare_recipe
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
    """Run the comparison, write its report, and copy what is small into `results/`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/reproduce"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--short", action="store_true", help="one task, one seed, a few steps")
    options = parser.parse_args()
    recipe = as_compare_recipe(HERE / "compare.yaml", SHORT if options.short else [])
    esft.compare(recipe, options.out, jobs=options.jobs, reporter=ConsoleReporter())
    report = esft.write_report(options.out)
    print(report.html)
    if not options.short:
        keep(options.out, HERE / "results")


def keep(out: Path, results: Path) -> None:
    """Copy what every run measured and the report as Markdown, without the runs themselves."""
    results.mkdir(exist_ok=True)
    for name in ("comparison.json", "report.md"):
        shutil.copyfile(out / name, results / name)
    shutil.rmtree(results / "figures", ignore_errors=True)
    shutil.copytree(out / "figures", results / "figures")


if __name__ == "__main__":
    main()

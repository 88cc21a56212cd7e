"""What was forgotten when a score was reached, at every learning rate that was tried.

    python examples/reproduce/rates.py examples/reproduce/results/compare

Prints a Markdown table: general loss above the base's, in nats a token, when the runs with the
first seed first reach 50 % and 80 % on the validation rows; a dash where they do not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from esft.comparison.curve import curve
from esft.comparison.records import read_comparison

SCORES = (0.5, 0.8)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path)
    found = read_comparison(parser.parse_args().comparison)
    print("| method | rate | " + " | ".join(found.tasks) + " |")
    print("|---" * (len(found.tasks) + 2) + "|")
    for method in found.methods:
        runs = [each for each in found.records if each.method == method and not each.sweep]
        runs = [each for each in runs if each.seed == found.seeds[0]]
        for rate in sorted({each.learning_rate for each in runs}):
            cells = []
            for task in found.tasks:
                at_rate = [each for each in runs if (each.task, each.learning_rate) == (task, rate)]
                curves = [drawn for each in at_rate if (drawn := curve(found, each)) is not None]
                values = [drawn.at(score) for drawn in curves for score in SCORES]
                chosen = "*" if any(each.chosen for each in at_rate) else ""
                text = ", ".join("–" if value is None else f"{value:.2f}" for value in values)
                cells.append(text + chosen)
            print(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

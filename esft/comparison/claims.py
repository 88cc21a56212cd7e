"""The paper's claims (arXiv 2407.01906), judged on a comparison by one rule.

1. ESFT is within a few points (`POINTS`) of full fine-tuning on the task, and above LoRA.
2. ESFT forgets less than full fine-tuning and than LoRA: when training ends, and at equal task
   score, which are judged apart, because a method that learns less also forgets less.
3. Selected experts beat as many that were drawn by chance.

The rule: a claim says that a difference between two methods, paired by seed, is on one side of a
threshold. It *held* if the mean is there and further from the threshold than the spread of the
pairs' differences; it *did not hold* if the mean is as far on the other side; in between, and with
a single seed, it is *undecided*. How mild that is, `esft.comparison.statistics` tells. A claim of
several findings held if all of them held, and did not if one of them did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esft.comparison import figures, tradeoff
from esft.comparison.figures import Figure, Unit, by_seed
from esft.comparison.records import Comparison
from esft.comparison.roles import FULL, is_control, is_esft, is_lora
from esft.comparison.statistics import Difference, Summary, paired

POINTS = 0.03  # what "within a few points" is taken for, as a share

Verdict = Literal["held", "did not hold", "undecided", "not measured"]
HELD: Verdict = "held"
DID_NOT_HOLD: Verdict = "did not hold"
UNDECIDED: Verdict = "undecided"
NOT_MEASURED: Verdict = "not measured"


@dataclass(frozen=True)
class Finding:
    """One comparison of two methods, on a task or on the average of all tasks.

    Attributes:
        task: its name; None is the average.
        method: the one, an ESFT.
        reference: the other.
        unit: of the difference.
        difference: by how much the one exceeds the other; None if there is no pair of runs.
        threshold: what the difference is held against.
        above: whether the claim says that the difference is above the threshold, or below.
    """

    task: str | None
    method: str
    reference: str
    unit: Unit
    difference: Difference | None
    threshold: float
    above: bool

    @property
    def verdict(self) -> Verdict:
        """What came out, by the module's rule."""
        if self.difference is None:
            return NOT_MEASURED
        if not self.difference.exceeds(self.threshold):
            return UNDECIDED
        return HELD if (self.difference.mean > self.threshold) == self.above else DID_NOT_HOLD


@dataclass(frozen=True)
class Claim:
    """One claim and what was found.

    Attributes:
        number: the paper's, 1 to 3.
        text: what it says.
        findings: on each task and, where there are several, on their average.
    """

    number: int
    text: str
    findings: tuple[Finding, ...]

    def on(self, task: str | None) -> Verdict:
        """Return the verdict on one task, or on the average (None)."""
        return together(finding.verdict for finding in self.findings if finding.task == task)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the average of the tasks, or on the only task."""
        return self.on(None)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "number": self.number,
            "text": self.text,
            "verdict": self.verdict,
            "findings": [
                {
                    **vars(finding),
                    "difference": finding.difference and vars(finding.difference),
                    "verdict": finding.verdict,
                }
                for finding in self.findings
            ],
        }


def judge(comparison: Comparison, points: float = POINTS) -> list[Claim]:
    """Judge the claims; what needs methods that the comparison lacks has no findings.

    Args:
        comparison: has the runs.
        points: how far below full fine-tuning ESFT may score, as a share.
    """
    names = comparison.methods
    score, end = figures.score(comparison.metric), tradeoff.forgotten_at_end(comparison)
    ours = [name for name in names if is_esft(name)]
    loras = [name for name in names if is_lora(name)]
    others = [name for name in (FULL, *loras) if name in names]

    def compare(
        pairs: Iterable[tuple[str, str]], figure: Figure, threshold: float, above: bool
    ) -> list[Finding]:
        def read(one: str, other: str, tasks: Sequence[str]) -> Difference | None:
            return paired(
                by_seed(comparison, one, figure, tasks), by_seed(comparison, other, figure, tasks)
            )

        return _findings(comparison.tasks, pairs, figure.unit, read, threshold, above)

    with_full = [(one, FULL) for one in ours if FULL in names]
    with_lora = [(one, other) for one in ours for other in loras]
    with_both = [(one, other) for one in ours for other in others]
    with_chance = [
        (one, other)
        for other in names
        if is_control(other) and (one := _nearest_size(comparison, other, ours)) is not None
    ]
    equal = _findings(
        comparison.tasks,
        with_both,
        "nats",
        lambda one, other, tasks: tradeoff.gap(comparison, one, other, tasks),
        threshold=0.0,
        above=False,
    )
    return [
        Claim(
            1,
            f"ESFT scores at most {100 * points:g} points below full fine-tuning, and above LoRA",
            (*compare(with_full, score, -points, True), *compare(with_lora, score, 0.0, True)),
        ),
        Claim(
            2,
            "ESFT has forgotten less than full fine-tuning and LoRA when training ends",
            tuple(compare(with_both, end, 0.0, False)),
        ),
        Claim(
            2,
            "ESFT has forgotten less than full fine-tuning and LoRA at equal task score",
            tuple(equal),
        ),
        Claim(
            3,
            "Selected experts score above as many experts drawn by chance",
            tuple(compare(with_chance, score, 0.0, True)),
        ),
    ]


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a claim that several findings bear on."""
    found = set(verdicts)
    if DID_NOT_HOLD in found:
        return DID_NOT_HOLD
    if not found or NOT_MEASURED in found:
        return NOT_MEASURED
    return HELD if found == {HELD} else UNDECIDED


def _findings(
    tasks: Sequence[str],
    pairs: Iterable[tuple[str, str]],
    unit: Unit,
    read: Callable[[str, str, Sequence[str]], Difference | None],
    threshold: float,
    above: bool,
) -> list[Finding]:
    """Compare pairs of methods on each task and on the average (which of one task is the task)."""
    places: list[tuple[str | None, Sequence[str]]] = [(task, [task]) for task in tasks]
    places.append((None, tasks))
    return [
        Finding(task, one, other, unit, read(one, other, over), threshold, above)
        for one, other in pairs
        for task, over in places
    ]


def _nearest_size(comparison: Comparison, control: str, ours: Sequence[str]) -> str | None:
    """Return the ESFT that trains as many parameters as a control, or most nearly so."""
    trained = next(figure for figure in figures.costs() if figure.key == "trained")

    def size(method: str) -> float | None:
        values = by_seed(comparison, method, trained, comparison.tasks).values()
        return Summary.of(list(values)).mean if values else None

    wanted = size(control)
    sizes = {one: found for one in ours if (found := size(one)) is not None}
    if wanted is None or not sizes:
        return ours[0] if ours else None
    return min(sizes, key=lambda one: abs(sizes[one] - wanted))

"""The paper's claims, judged on comparisons whose answer is plain."""

from __future__ import annotations

import json

import pytest
from run_records import compared, run

from esft.comparison.claims import (
    DID_NOT_HOLD,
    HELD,
    NOT_MEASURED,
    UNDECIDED,
    Claim,
    judge,
    together,
)
from esft.comparison.records import Comparison

NOISE = [-0.01, 0.0, 0.01]


def _compared(
    scores: dict[str, float],
    lost: dict[str, float] | None = None,
    *,
    seeds: int = 3,
    trained: dict[str, int] | None = None,
) -> Comparison:
    """Return runs of methods by their score, and what they forget by then on a straight line.

    Seeds differ by 0.01 in score, and so do methods, the other way round for every second one:
    differences have a spread of 0.02 or 0.
    """
    return compared(
        *(
            run(
                method,
                seed,
                score + (-1) ** place * NOISE[seed],
                (lost or {}).get(method, 0.0),
                curve=[(0.0, 0.0), (score, (lost or {}).get(method, 0.0))],
                trained=(trained or {}).get(method, 100),
            )
            for place, (method, score) in enumerate(scores.items())
            for seed in range(seeds)
        )
    )


def _verdicts(comparison: Comparison) -> list[str]:
    return [claim.verdict for claim in judge(comparison)]


def test_all_claims_hold() -> None:
    found = _compared(
        {"esft-token": 0.90, "full": 0.90, "lora": 0.80, "random": 0.70},
        {"esft-token": 0.1, "full": 0.5, "lora": 0.3, "random": 0.2},
    )
    assert _verdicts(found) == [HELD] * 4


def test_none_holds() -> None:
    found = _compared(
        {"esft-token": 0.80, "full": 0.90, "lora": 0.88, "random": 0.85},
        {"esft-token": 0.5, "full": 0.1, "lora": 0.1, "random": 0.1},
    )
    assert _verdicts(found) == [DID_NOT_HOLD] * 4


def test_within_the_spread_nothing_is_decided() -> None:
    found = _compared({"esft-token": 0.90, "full": 0.91, "lora": 0.90, "random": 0.89})
    assert _verdicts(found) == [UNDECIDED] * 4


def test_a_single_seed_decides_nothing() -> None:
    found = _compared(
        {"esft-token": 0.9, "full": 0.9, "lora": 0.1, "random": 0.1}, {"full": 0.5}, seeds=1
    )
    assert _verdicts(found) == [UNDECIDED] * 4


def test_forgetting_at_the_end_and_at_equal_score_are_told_apart() -> None:
    """LoRA learns half as much and forgets less by the end, but more for what it has learnt."""
    found = _compared(
        {"esft-token": 0.9, "full": 0.9, "lora": 0.45},
        {"esft-token": 0.10, "full": 0.5, "lora": 0.08},
    )
    assert _verdicts(found) == [HELD, DID_NOT_HOLD, HELD, NOT_MEASURED]


@pytest.mark.parametrize(
    ("points", "verdict"), [(0.05, HELD), (0.005, UNDECIDED), (-0.03, DID_NOT_HOLD)]
)
def test_how_near_to_full_is_a_threshold(points: float, verdict: str) -> None:
    """0.01 below full with a spread of 0.02: 0.04 above the threshold, 0.005 and 0.04 below."""
    claim = judge(_compared({"esft-token": 0.90, "full": 0.91, "lora": 0.5}), points)[0]
    assert claim.on("dates") == verdict


def test_a_claim_about_two_methods_needs_both() -> None:
    found = _compared({"esft-token": 0.90, "esft-gate": 0.70, "full": 0.90, "lora": 0.80})
    claim = judge(found)[0]
    by_pair = {
        (finding.method, finding.reference): finding.verdict
        for finding in claim.findings
        if finding.task is None
    }
    assert by_pair == {
        ("esft-token", "full"): HELD,
        ("esft-token", "lora"): HELD,
        ("esft-gate", "full"): DID_NOT_HOLD,
        ("esft-gate", "lora"): DID_NOT_HOLD,
    }
    assert claim.verdict == DID_NOT_HOLD


def test_a_control_is_compared_with_the_selection_of_its_size() -> None:
    found = _compared(
        {"esft-token": 0.9, "esft-gate": 0.9, "random": 0.5, "random-unselected": 0.5},
        trained={"esft-token": 200, "esft-gate": 100, "random": 201, "random-unselected": 100},
    )
    claim = judge(found)[3]
    pairs = {(finding.method, finding.reference) for finding in claim.findings}
    assert pairs == {("esft-token", "random"), ("esft-gate", "random-unselected")}


def test_what_was_not_run_is_not_measured() -> None:
    assert _verdicts(_compared({"lora": 0.5, "full": 0.5})) == [NOT_MEASURED] * 4
    failed = compared(run("esft-token", 0, 0.9), run("full", 0, failed=True))
    assert _verdicts(failed) == [NOT_MEASURED] * 4


def test_tasks_are_judged_one_by_one_and_together() -> None:
    runs = [
        run(method, seed, score + NOISE[seed], task=task)
        for method, scores in {"esft-token": (0.9, 0.6), "random": (0.7, 0.7)}.items()
        for task, score in zip(("dates", "json"), scores, strict=True)
        for seed in range(3)
    ]
    claim = judge(compared(*runs))[3]
    assert (claim.on("dates"), claim.on("json"), claim.verdict) == (HELD, DID_NOT_HOLD, HELD)


def test_a_claim_is_json_ready() -> None:
    claims = judge(_compared({"esft-token": 0.9, "full": 0.9, "lora": 0.8}))
    found = json.loads(json.dumps([claim.to_dict() for claim in claims], allow_nan=False))
    assert found[0]["findings"][0]["verdict"] == HELD
    assert found[0]["findings"][0]["difference"]["pairs"] == 3
    assert found[3] == Claim(3, claims[3].text, ()).to_dict()


def test_verdicts_together() -> None:
    assert together([]) == NOT_MEASURED
    assert together([HELD, HELD]) == HELD
    assert together([HELD, UNDECIDED]) == UNDECIDED
    assert together([HELD, NOT_MEASURED]) == NOT_MEASURED
    assert together([HELD, NOT_MEASURED, UNDECIDED, DID_NOT_HOLD]) == DID_NOT_HOLD

"""The names of a run's files."""

from pathlib import Path

RECIPE, SELECTION, SCORES = "recipe.yaml", "selection.json", "scores.json"
METRICS, CHECKPOINTS, DELTA, CARD = "metrics.jsonl", "checkpoints", "delta", "README.md"
DIVERGED = "diverged.json"
MATCHED = "matched_selection.json"  # what ESFT would train, where LoRA's rank follows from it
BAD_ROWS = "bad_rows.jsonl"
# Scores on one sample, where experts are selected: `scores.json` may be of a larger one, or absent.
ROUTING_BEFORE, ROUTING_AFTER = "routing_before.json", "routing_after.json"
RESULT, TEST_ANSWERS = "result.json", "test.jsonl"


def is_complete(run: Path) -> bool:
    """Return whether a run is finished: its result is written last."""
    return (run / RESULT).exists() and (run / DELTA).exists()

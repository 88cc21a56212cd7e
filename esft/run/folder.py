"""The names of a run's files."""

RECIPE, SELECTION, SCORES = "recipe.yaml", "selection.json", "scores.json"
METRICS, CHECKPOINTS, DELTA, CARD = "metrics.jsonl", "checkpoints", "delta", "README.md"
DIVERGED = "diverged.json"
BAD_ROWS = "bad_rows.jsonl"

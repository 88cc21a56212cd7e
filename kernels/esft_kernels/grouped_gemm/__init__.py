"""Each row times its expert's matrix."""

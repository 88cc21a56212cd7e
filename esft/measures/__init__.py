"""How good a model's answers are, and what it has kept of everything else."""

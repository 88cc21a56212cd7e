"""One training run: its loop, its data, its checkpoints, and what is told of it."""

"""Several methods, one recipe: the runs, what they measured, and what follows from it."""

"""Which row goes where."""

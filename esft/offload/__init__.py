"""Models whose routed experts do not fit: some are at hand, the others are fetched when needed."""

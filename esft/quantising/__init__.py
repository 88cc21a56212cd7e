"""Frozen weights in 8 or 4 bits, under experts that train in full precision."""

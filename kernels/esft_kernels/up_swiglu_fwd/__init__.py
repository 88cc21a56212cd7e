"""The up projection with SwiGLU."""

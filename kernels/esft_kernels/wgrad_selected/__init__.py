"""Weight gradients of the trainable bank."""

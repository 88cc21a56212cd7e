"""Expert computation that forms weight gradients for the trainable experts only.

Stands on its own: nothing here knows of checkpoints, recipes or transformers.

Shape letters: T tokens, K top-k, N = T*K routed rows, E experts, n trainable experts, H hidden,
I expert inner.
"""

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import ExpertBank, Projection
from esft_kernels.layer import moe_mlp

__all__ = ["ExpertBank", "Projection", "SwiGLU", "moe_mlp"]

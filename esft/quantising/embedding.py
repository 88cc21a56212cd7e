"""Input embeddings kept in few bits: only the rows of the tokens at hand are read."""

from __future__ import annotations

from esft_kernels.quantised import Quantised
from torch import Tensor, nn

from esft.quantising.stored import StoredWeight


class QuantisedEmbedding(nn.Embedding):
    """A frozen `[V, H]` that is looked up row by row.

    Args:
        weight: `[V, H]`.
        padding_idx: as of the embedding that it stands in for; it has no gradient anyway.
    """

    def __init__(self, weight: Quantised, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's would allocate a weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.stored = StoredWeight(weight)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole weight, read now: for code that looks at it itself."""
        return self.stored.value.dequantise()

    def forward(self, ids: Tensor) -> Tensor:
        """Return `[..., H]` for token ids `[...]`."""
        rows_NH = self.stored.value[ids.reshape(-1)].dequantise()
        return rows_NH.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Say what it is, in a printed model."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

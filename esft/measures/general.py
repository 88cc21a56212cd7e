"""What a model has kept of everything else: its held-out loss on other domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esft.data.example import Example
from esft.evaluation import evaluate_model
from esft.progress import SILENT, Reporter


def domain_losses(
    model: Any,
    examples: Mapping[str, Sequence[Example]],
    *,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> dict[str, float]:
    """Return the mean loss of each domain's answer tokens, in nats; of a text, every token's.

    Args:
        model: a transformers causal language model; its mode is restored.
        examples: of each domain, from `encode_rows`.
        batch_tokens: see `esft.evaluation.score_rows`.
        reporter: shows progress.

    Raises:
        DataError: a domain has no rows, or none with an answer.
        ModelError: the model's logits are not finite.
    """
    return {
        name: evaluate_model(model, rows, batch_tokens=batch_tokens, reporter=reporter).loss
        for name, rows in examples.items()
    }


def mean(losses: Mapping[str, float]) -> float:
    """Return the mean over the domains: each counts the same, however many rows it has."""
    return sum(losses.values()) / len(losses)

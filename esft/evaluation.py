"""How well a model answers a test set: exact match, loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from esft.data.batching import batches, padded
from esft.data.example import Example
from esft.errors import DataError, EsftError, ModelError
from esft.progress import SILENT, Reporter

_AT_ONCE = 1024  # rows of logits turned into float32 at a time
_LARGEST_LOSS = 700.0  # e to the power of more is no float


@dataclass(frozen=True, slots=True)
class RowScore:
    """How well a model answers one row.

    Attributes:
        where: `file:line` of the row.
        matched: whether greedy decoding would write the reference answer, end included.
        loss: sum of the answer tokens' negative log-likelihoods, in nats.
        tokens: how many answer tokens it has, end token included.
    """

    where: str
    matched: bool
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What one forward pass a row tells of a model.

    Attributes:
        rows: how many rows were scored.
        tokens: how many answer tokens they have, end tokens included.
        matched: how many rows the model answers exactly.
        loss: mean negative log-likelihood of an answer token, in nats.
    """

    rows: int
    tokens: int
    matched: int
    loss: float

    @property
    def exact_match(self) -> float:
        """Share of the rows that the model answers exactly, 0 to 1."""
        return self.matched / self.rows

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)

    @classmethod
    def of(cls, rows: Sequence[RowScore]) -> Evaluation:
        """Sum up rows; every token counts the same, whichever row it is in.

        Raises:
            DataError: no row has an answer token.
            ModelError: the loss is too large for a perplexity.
        """
        tokens = sum(row.tokens for row in rows)
        if not tokens:
            raise DataError(f"{rows[0].where}: no row has an answer token to score")
        loss = math.fsum(row.loss for row in rows) / tokens
        if loss > _LARGEST_LOSS:
            raise ModelError(f"the loss is {loss:.3g}: the model's weights are damaged")
        return cls(len(rows), tokens, sum(row.matched for row in rows), loss)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"exact_match": self.exact_match, "perplexity": self.perplexity}


def evaluate_model(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> Evaluation:
    """Score a loaded model and sum the rows up; arguments and errors as for `score_rows`."""
    return Evaluation.of(score_rows(model, examples, batch_tokens=batch_tokens, reporter=reporter))


def score_rows(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> list[RowScore]:
    """Score a loaded model row by row, in one forward pass a row; in the order given.

    A row matches exactly if greedy decoding, given the prompt, would write the reference answer
    token for token and stop: if at each answer token the reference is the likeliest next token
    after the *reference's* text so far. This is the same, by induction over the answer: the
    first token is predicted from the prompt in both cases. If the first n tokens match, greedy
    decoding has so far written the reference, so that both predict token n + 1 from one text.
    At the first token that differs, greedy decoding has left the reference and the row is wrong
    in both. (In a conversation, each answer is asked for after the reference's earlier turns.)

    Args:
        model: a transformers causal language model; its mode is restored.
        examples: from `encode_rows`.
        batch_tokens: tokens a forward pass, padding included; a longer row goes alone. Logits
            take at most `batch_tokens` times the vocabulary, in the model's dtype.
        reporter: shows progress.

    Raises:
        DataError: there are no examples.
        EsftError: `batch_tokens` is not positive.
        ModelError: the model's logits are not finite.
    """
    if not examples:
        raise DataError("no rows to score")
    if batch_tokens < 1:
        raise EsftError(f"--batch-tokens {batch_tokens}: expected at least 1")
    was_training = model.training
    model.eval()
    scores: dict[int, RowScore] = {}
    try:
        with torch.no_grad(), reporter.task("scoring", len(examples), "row") as task:
            for rows in batches([len(example.input_ids) for example in examples], batch_tokens):
                batch = [examples[row] for row in rows]
                scores |= zip(rows, _score(model, batch), strict=True)
                if not math.isfinite(sum(scores[row].loss for row in rows)):
                    raise ModelError(
                        f"{batch[0].where}: the model's logits for this row, or one scored with "
                        f"it, are NaN or infinite; its weights are damaged or training diverged"
                    )
                task.advance(len(batch), tokens=sum(len(e.input_ids) for e in batch))
    finally:
        model.train(was_training)
    return [scores[row] for row in range(len(examples))]


def _score(model: Any, batch: list[Example]) -> list[RowScore]:
    device = model.device
    ids_BS, real_BS = padded([example.input_ids for example in batch])
    # Nothing predicts the first token.
    answer_BS = padded([[False, *example.completion[1:]] for example in batch])[0].bool()
    # The logits at a position predict the token after it.
    predicts_BS = answer_BS.roll(-1, dims=1)
    kept_P = predicts_BS.any(dim=0).nonzero().squeeze(1)
    inputs: dict[str, Any] = {"input_ids": ids_BS.to(device), "attention_mask": real_BS.to(device)}
    # The model itself computes the logits (families scale or cap them), at the positions asked
    # for if it can: over a large vocabulary they are most of the memory.
    if "logits_to_keep" in signature(model.forward).parameters:
        inputs["logits_to_keep"] = kept_P.to(device)
        logits_BPV = model(**inputs, use_cache=False).logits
    else:
        logits_BPV = model(**inputs, use_cache=False).logits[:, kept_P.to(device)]
    row_N, place_N = predicts_BS[:, kept_P].nonzero(as_tuple=True)
    target_N = ids_BS[row_N, kept_P[place_N] + 1]
    right_N, loss_N = _compare(
        logits_BPV, row_N.to(device), place_N.to(device), target_N.to(device)
    )
    wrong = set(row_N[~right_N].tolist())
    losses_B = torch.zeros(len(batch), dtype=torch.float64).index_add(0, row_N, loss_N)
    return [
        RowScore(example.where, number not in wrong, loss, example.supervised)
        for number, (example, loss) in enumerate(zip(batch, losses_B.tolist(), strict=True))
    ]


def _compare(
    logits_BPV: Tensor, row_N: Tensor, place_N: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return which of N predictions are right, and their losses in nats (float64), on the CPU."""
    right: list[Tensor] = []
    losses: list[Tensor] = []
    for row, place, target in zip(
        row_N.split(_AT_ONCE), place_N.split(_AT_ONCE), target_N.split(_AT_ONCE), strict=True
    ):
        logits = logits_BPV[row, place].float()
        reference = logits.gather(1, target[:, None]).squeeze(1)
        right.append((logits.argmax(dim=1) == target).cpu())
        losses.append((logits.logsumexp(dim=1) - reference).cpu().double())
    return torch.cat(right), torch.cat(losses)

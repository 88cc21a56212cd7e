"""Profile an encoder-decoder on pairs of texts: the encoder's experts and the decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from esft.data.batching import batches, padded
from esft.errors import DataError, ModelError
from esft.moe import MoeLayer, anatomy
from esft.routing import HALVES, NOT_COUNTED, RoutingSums
from esft.scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 8192  # padded, of sources and targets


class Pair(NamedTuple):
    """A source and its target as token ids, both with the end token that the model expects."""

    source: list[int]
    target: list[int]


def profile_pairs(model: PreTrainedModel, pairs: Sequence[Pair]) -> Scores:
    """Score the routed experts of an encoder-decoder in memory.

    Scores are defined as in `esft.profiling.profile_model`. Encoder layers are scored over the
    tokens of the sources, decoder layers over those of the targets; padding never counts. The
    decoder reads what it is trained on: the start token, then the target but its last token. What
    a router chose counts, whether or not the chosen expert had room for the token.

    Args:
        model: left as it was, but for the mode: it is put into evaluation mode meanwhile.
        pairs: the sample.

    Raises:
        ModelError: the model is no encoder-decoder, is dense, or cannot be profiled.
        DataError: no pair, or one whose source or target is empty.
    """
    if not model.config.is_encoder_decoder:
        raise ModelError(f"{model.config.model_type}: this is no encoder-decoder")
    if not pairs or not all(pair.source and pair.target for pair in pairs):
        raise DataError("pairs: there is none, or one whose source or target is empty")
    found = anatomy(model)
    sides = _sides(model, found.layers)
    sums = [RoutingSums(layers) for layers in sides]
    tokens = [sum(map(len, side)) for side in zip(*pairs, strict=True)]
    start = model.config.decoder_start_token_id
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), sums[0].hooked(), sums[1].hooked():
            for rows in batches([len(pair.source + pair.target) for pair in pairs], _BATCH_TOKENS):
                chosen = [pairs[row] for row in rows]
                ids, mask = padded([pair.source for pair in chosen])
                decoder_ids, decoder_mask = padded([[start, *pair.target[:-1]] for pair in chosen])
                for side, real in zip(sums, (mask, decoder_mask), strict=True):
                    # The halves are for nothing but to leave padding out.
                    side.half_T = torch.where(real.bool(), 0, NOT_COUNTED).flatten()
                inputs: dict[str, Any] = {
                    "input_ids": ids,
                    "attention_mask": mask,
                    "decoder_input_ids": decoder_ids,
                    "decoder_attention_mask": decoder_mask,
                }
                on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
                model(**on_device, use_cache=False)
    finally:
        model.train(training)
    layers = {
        index: scores
        for side, count in zip(sums, tokens, strict=True)
        for index, scores in side.scores(range(HALVES), count).items()
    }
    return Scores(
        layers=layers,
        model={
            "name": model.config._name_or_path or found.architecture,
            "model_type": found.model_type,
            "architecture": found.architecture,
            "parameters": found.total,
            "routed_parameters": found.routed,
            "expert_parameters": found.per_expert,
            "bytes_per_parameter": model.dtype.itemsize,
        },
        sample={"count": "all", "tokens": sum(tokens), "sequences": len(pairs)},
    )


def _sides(
    model: PreTrainedModel, layers: Sequence[MoeLayer]
) -> tuple[list[MoeLayer], list[MoeLayer]]:
    """Tell the encoder's layers from the decoder's."""
    encoder = set(model.get_encoder().modules())
    inside = [layer for layer in layers if layer.experts in encoder]
    return inside, [layer for layer in layers if layer.experts not in encoder]

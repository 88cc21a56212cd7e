"""Documents -> fixed rows of token ids, each document standing alone.

Letters: N rows, S tokens a row. A row holds several documents `<s> ... </s>`; positions restart at
each `<s>`, by which transformers keeps the documents from attending to one another.
"""

from collections.abc import Iterable

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def pack(documents: Iterable[list[int]], row: int) -> np.ndarray:
    """Cut documents of token ids into full rows, uint16 `[N, S]` with S = `row`.

    A document longer than a row runs on in the next one. A shorter one that crosses the edge is
    started again in the next row, so that no row begins in the middle of a line. The last,
    unfilled row is dropped.
    """
    rows: list[list[int]] = []
    current: list[int] = []
    for ids in documents:
        room = row - len(current)
        if len(ids) <= room:
            current += ids
            continue
        rows.append(current + ids[:room])
        rest = ids if len(ids) <= row else ids[room:]
        while len(rest) > row:
            rows.append(rest[:row])
            rest = rest[row:]
        current = list(rest)
    if len(current) == row:
        rows.append(current)
    return np.array(rows, dtype=np.uint16).reshape(-1, row)


def encode(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, batch: int = 1_000
) -> Iterable[list[int]]:
    """Each document as `<s>` + text + `</s>`."""
    for start in range(0, len(documents), batch):
        for ids in tokenizer(documents[start : start + batch], verbose=False)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def positions(ids_NS: torch.Tensor, bos: int) -> torch.Tensor:
    """Position of each token in its own document, int64 `[N, S]`; a row starts at 0."""
    index_S = torch.arange(ids_NS.shape[1])
    starts_NS = torch.where(ids_NS == bos, index_S, 0).cummax(dim=1).values
    return index_S - starts_NS


def model_inputs(ids_NS: torch.Tensor, bos: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids` and `labels`; nothing has to predict where a document starts."""
    return {
        "input_ids": ids_NS,
        "position_ids": positions(ids_NS, bos),
        "labels": ids_NS.masked_fill(ids_NS == bos, -100),
    }

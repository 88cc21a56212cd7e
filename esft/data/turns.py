"""Rendered conversations to tokens: which belong to which answer, and what they weigh."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from esft.data.answers import Rendering
from esft.data.example import Example
from esft.data.row import Row
from esft.data.tokens import end_ids, eos_id, token_ids
from esft.errors import DataError


def tokenise_chats(
    chats: Sequence[tuple[Row, Rendering]],
    tokenizer: Any,
    *,
    given: bool = False,
    last_turn_only: bool = False,
    append_eos: bool = False,
    check_end: bool = True,
) -> list[Example | DataError]:
    """Turn rendered conversations into tokens.

    Args:
        chats: rows and their text.
        tokenizer: that of the renderings.
        given: whether answers in the conversation's prompt are learnt, too; see `Row.given`.
        last_turn_only: whether only the last answer is learnt.
        append_eos: whether EOS ends the last answer of a conversation in which the template ends
            none.
        check_end: whether a conversation of which no end is learnt is refused.

    Returns:
        For each, its tokens, or that no answer's end is learnt.

    Raises:
        ModelError: with `append_eos`, the tokenizer has no EOS.
    """
    cuts = [_cuts(rendering) for _, rendering in chats]
    # The whole and what is before each cut; a text that occurs twice (an answer often ends where
    # the whole does) is tokenised once.
    texts = [
        [rendering.text[:cut] for cut in (*at, len(rendering.text))]
        for (_, rendering), at in zip(chats, cuts, strict=True)
    ]
    distinct = list(dict.fromkeys(text for group in texts for text in group))
    # The template wrote the special tokens; the tokenizer must not add its own.
    ids = dict(zip(distinct, token_ids(distinct, tokenizer), strict=True))
    ends = end_ids(tokenizer)
    eos = eos_id(tokenizer) if append_eos else None
    examples: list[Example | DataError] = []
    for (row, rendering), at, group in zip(chats, cuts, texts, strict=True):
        *prefixes, whole = (ids[text] for text in group)
        parts = _parts(rendering.text, at, whole, prefixes, tokenizer)
        learnt = _learnt(row, given=given, last_turn_only=last_turn_only)
        example, ended = _example(row, rendering, parts, learnt, ends, tokenizer)
        if not ended and eos is not None and len(row.messages) - 1 in learnt:
            example, ended = _with_end(example, eos), True
        if ended or not check_end or not any(example.completion):
            examples.append(example)
        else:
            examples.append(_endless(row, rendering))
    return examples


def _cuts(rendering: Rendering) -> list[int]:
    """Return where in the text answers start and end, in turn."""
    return [cut for answer in rendering.answers for cut in (answer.start, answer.end)]


def _parts(
    text: str, cuts: list[int], whole: list[int], prefixes: list[list[int]], tokenizer: Any
) -> list[list[int]]:
    """Cut a text's tokens where its answers start and end; every second part is an answer."""
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        edges = [0, *(len(prefix) for prefix in prefixes), len(whole)]
        return [whole[a:b] for a, b in pairwise(edges)]
    # A token spans a cut. A model that answers sees the prompt's tokens end there, so the text is
    # tokenised in parts.
    return token_ids([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], tokenizer)


def _learnt(row: Row, *, given: bool, last_turn_only: bool) -> set[int]:
    """Return which messages are answers to learn, by their index."""
    turns = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    if last_turn_only:
        turns = turns[-1:]
    return {i for i in turns if (given or i >= row.given) and row.messages[i].weight != 0}


def _example(
    row: Row,
    rendering: Rendering,
    parts: list[list[int]],
    learnt: set[int],
    ends: set[int],
    tokenizer: Any,
) -> tuple[Example, bool]:
    """Join a conversation's parts; also tell whether the end of an answer is learnt."""
    ids: list[int] = []
    completion: list[bool] = []
    weights: list[float] = []
    ended = False
    for place, part in enumerate(parts):
        answer, weight = 0, 1.0
        if place % 2:
            message = rendering.answers[place // 2].message
            weight = _weight(row.messages[message].weight)
            if message in learnt:
                end = _end(part, ends, tokenizer)
                answer = len(part) if end is None or rendering.marked else end
                ended |= end is not None
        ids += part
        completion += [True] * answer + [False] * (len(part) - answer)
        weights += [weight] * len(part)
    uniform = all(weight == 1 for weight in weights)
    return Example(ids, completion, row.where, None if uniform else weights), ended


def _with_end(example: Example, eos: int) -> Example:
    """Put EOS behind the last answer, as heavy as it."""
    at = len(example.completion) - example.completion[::-1].index(True)
    weights = example.weights
    return Example(
        [*example.input_ids[:at], eos, *example.input_ids[at:]],
        [*example.completion[:at], True, *example.completion[at:]],
        example.where,
        None if weights is None else [*weights[:at], weights[at - 1], *weights[at:]],
    )


def _endless(row: Row, rendering: Rendering) -> DataError:
    left_out = (
        "the chat template's generation tags leave it out"
        if rendering.marked
        else "the chat template writes none"
    )
    return DataError(
        f"{row.where}: EOS is never supervised: no end-of-turn token among the answer's "
        f"({left_out}), so the model would not learn to stop; mend the template, or set "
        f"data.append_eos: true"
    )


def _end(part: list[int], ends: set[int], tokenizer: Any) -> int | None:
    """Count a rendered answer's tokens up to the one that ends the turn; None if there is none.

    Templates put a line break after it, which the model never gets to write.
    """
    for length in range(len(part), 0, -1):
        if part[length - 1] in ends:
            return length
        if tokenizer.decode([part[length - 1]]).strip():
            return None
    return None


def _weight(weight: float | None) -> float:
    return 1.0 if weight is None else float(weight)

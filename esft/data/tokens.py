"""What a tokenizer does to text, and which of its tokens mean an end."""

from __future__ import annotations

from typing import Any

from esft.errors import ModelError


def token_ids(texts: list[str], tokenizer: Any, *, special: bool = False) -> list[list[int]]:
    """Tokenise texts; with `special`, with the tokens that the tokenizer adds by itself."""
    if not texts:
        return []
    # verbose=False: whether a row is too long is decided elsewhere, not by the tokenizer's limit.
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def prompt_ids(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise texts that an answer follows: with BOS, if the tokenizer adds one, without EOS."""
    ids = token_ids(prompts, tokenizer, special=True)
    if _adds_eos(tokenizer):  # only the answer's own end is an end
        return [prompt[:-1] for prompt in ids]
    return ids


def _adds_eos(tokenizer: Any) -> bool:
    with_special = token_ids(["a"], tokenizer, special=True)[0]
    without = token_ids(["a"], tokenizer)[0]
    eos = tokenizer.eos_token_id
    return eos is not None and with_special[-1] == eos and without[-1:] != [eos]


def eos_id(tokenizer: Any) -> int:
    """Return the token that ends a text.

    Raises:
        ModelError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where an "
            "answer ends; set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def end_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that may end a turn: the special ones.

    Which of them does differs by family and is not always the tokenizer's EOS.
    """
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

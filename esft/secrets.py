"""Access tokens and passwords: told from other text, so that none is written or shown."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"

# As the Hugging Face hub and Weights & Biases make them.
_TOKEN = re.compile(r"\b(hf_|api_org_|wandb_v1_)[A-Za-z0-9_]{16,}")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_VARIABLE = re.compile(r"(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")
_SHORTEST = 16  # characters; what is shorter may be a word that is used elsewhere, too


def redact(text: str) -> str:
    """Return a text with every secret in it replaced by `HIDDEN`.

    Secrets are what has the form of an access token, the user and password of an address
    (`https://user:password@host`), and what environment variables hold whose names end like
    `HF_TOKEN` and `WANDB_API_KEY`.
    """
    for value in sorted(_held_by_environment(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, _IN_ADDRESS.sub(HIDDEN, text))


def has_secret(text: str) -> bool:
    """Tell whether there is anything to hide in a text."""
    return redact(text) != text


def _held_by_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name.upper()) and len(value) >= _SHORTEST
    }

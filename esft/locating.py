"""From a MODEL argument (folder, hub id or `tiny-moe`) to a folder; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from esft.errors import ModelError, nearest

TINY_MOE = "tiny-moe"
TINY_MOE_FOLDER = Path(__file__).parent / "tiny_moe"
_SHIPPED = f"{TINY_MOE}:"  # before the path of a file that ships with the model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a checkpoint needs to be loaded; pickled weights are never fetched. The licence in its card
# is taken over by the cards of deltas and merges.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*", "LICENSE*"]
_HUB_FILES += ["README.md"]
# The same weights once more, in the layout of their maker's own code.
_HUB_COPIES = ["*/*.safetensors", "consolidated*.safetensors"]


trusted = ContextVar("trusted", default=False)


@contextmanager
def trusting_remote_code() -> Iterator[None]:
    """Let checkpoints that are loaded inside the block run code of their own (`auto_map`).

    Such code can do whatever the user can. Without this, a checkpoint that needs it is refused,
    and one that transformers has a class for is loaded by that class.
    """
    token = trusted.set(True)
    try:
        yield
    finally:
        trusted.reset(token)


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint, downloading it if `model` is a hub id.

    Args:
        model: a folder with a `config.json`, a hub id (`Qwen/Qwen3-30B-A3B`), or `tiny-moe`.
        weights: whether to download these, too, or only what is small.

    Raises:
        ModelError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    if str(model) == TINY_MOE:
        return TINY_MOE_FOLDER
    if not str(model).strip():
        raise ModelError("no model: give a checkpoint's folder, a hub id, or tiny-moe")
    try:
        path = Path(model).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, no such user's home, no access
        raise ModelError(f"{model}: cannot look for this folder: {error}") from None
    if is_folder:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder; not a checkpoint")
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        raise ModelError(f"{model}: no such folder; give a checkpoint's folder or a hub id")
    return _download(str(model), weights)


def locate_shipped(path: str) -> str:
    """Return where a file or folder that ships lies: `tiny-moe:tasks/dates/train.jsonl`.

    Any other path is returned as it is.
    """
    if not path.startswith(_SHIPPED):
        return path
    return str(TINY_MOE_FOLDER / path.removeprefix(_SHIPPED))


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=[*_HUB_FILES, *(["*.py"] if trusted.get() else [])],
                ignore_patterns=_HUB_COPIES if weights else ["*.safetensors"],
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id}: the hub gives this model only to those who accepted its terms; accept "
            f"them on its page, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: no such folder, and no such model on the hub (a private one needs: "
            f"hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: no such folder, and the hub cannot be reached and has no cached copy here"
            f"{nearest(hub_id, [TINY_MOE])}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{hub_id}: cannot download this model: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, with its type where the message alone says little."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError | AssertionError):
        return lines[0] if lines else type(error).__name__
    return ": ".join([type(error).__name__, *lines[:2]])

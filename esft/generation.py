"""A model's answer to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from esft.data.encode import encode_prompt
from esft.errors import DataError, EsftError
from esft.inference import load


def generate(
    model: str | Path,
    prompt: str,
    *,
    delta: str | Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    chat: bool = False,
) -> str:
    """Load a model and return its answer to a prompt.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        prompt: the text, tokenised as the `prompt` of a training row.
        delta: folder of a delta made from this model.
        max_new_tokens: stop after this many tokens; the model stops earlier by itself.
        temperature: 0 takes the likeliest token each time; more draws among all, by softmax of
            logits / temperature.
        seed: of the draw.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: see `esft.loading.pick_dtype`.
        chat: put the prompt into the model's chat template.

    Raises:
        EsftError: a number is out of range; `DataError` if the prompt cannot be used.
        ModelError: the model cannot be loaded.
        DeltaError: the delta is damaged.
        CheckError: the delta was made from another base.
    """
    _check(prompt, max_new_tokens, temperature)
    loaded, tokenizer = load(model, delta=delta, device=device, dtype=dtype)
    return generate_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Return a loaded model's answer to a prompt; arguments and errors as for `generate`."""
    _check(prompt, max_new_tokens, temperature)
    ids = encode_prompt(prompt, tokenizer, chat=chat)
    if not ids:
        raise DataError("--prompt: no tokens in this text")
    inputs = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:  # among all tokens: transformers would keep the 50 likeliest
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=_stops(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or 0,  # one row: nothing is padded
        **sampling,
    )
    # In place of the checkpoint's own settings, not beside them: its repetition penalty, say,
    # would make "the likeliest token" untrue.
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = settings
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = model.generate(inputs, attention_mask=torch.ones_like(inputs))
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def _check(prompt: str, max_new_tokens: int, temperature: float) -> None:
    if not prompt.strip():
        raise DataError("--prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of an argument that Python could not read as text
        raise DataError(
            "--prompt: not text in this locale's encoding; choose a UTF-8 one, as by LC_ALL=C.UTF-8"
        ) from None
    if max_new_tokens < 1:
        raise EsftError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise EsftError(f"--temperature {temperature}: expected 0 or more")


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those the checkpoint names, and the one training added."""
    named = model.generation_config.eos_token_id
    stops = named if isinstance(named, list) else [named]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})

"""A model's answer to a prompt, or to many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from esft.data.batching import batches
from esft.data.encode import encode_prompt
from esft.errors import DataError, EsftError
from esft.inference import opened
from esft.offload.expert_memory import ExpertMemory
from esft.progress import SILENT, Reporter

# Layers that give a token what it gets alone, whatever padding is left of it.
_PADDABLE = {"full_attention", "sliding_attention"}


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
    expert_memory: str | int | ExpertMemory | None = None,
    reporter: Reporter = SILENT,
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
        expert_memory: bytes that the routed experts may take, such as `2GB`, or an `ExpertMemory`,
            whose figures then say how it went; None has them all in memory.
        reporter: told where the experts are, if not in memory.

    Raises:
        EsftError: a number is out of range; `DataError` if the prompt cannot be used.
        ModelError: the model cannot be loaded, or its experts only as a whole.
        DeltaError: the delta is damaged.
        CheckError: the delta was made from another base.
    """
    _check(prompt, max_new_tokens, temperature)
    with opened(
        model,
        delta=delta,
        device=device,
        dtype=dtype,
        expert_memory=expert_memory,
        reporter=reporter,
    ) as (loaded, tokenizer):
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
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:  # among all tokens: transformers would keep the 50 likeliest
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    with _settings(model, tokenizer, max_new_tokens=max_new_tokens, **sampling):
        torch.manual_seed(seed)
        (answer,) = _answers(model, [ids], _stops(model, tokenizer))
    return tokenizer.decode(answer, skip_special_tokens=True)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> list[str]:
    """Return a loaded model's greedy answers to many prompts, several at a time.

    Prompts of like length go together, the shorter ones padded on the left. For a model in which
    padding would change the answers (recurrent layers, positions that are counted from the row's
    start), only prompts of one length go together.

    Args:
        model: a transformers causal language model; its mode and settings are restored.
        tokenizer: the model's.
        prompts: token ids of each, at least one.
        max_new_tokens: of an answer at most; the model stops earlier by itself.
        batch_tokens: tokens at a time, with padding and answers; a longer prompt goes alone.
        reporter: shows progress.

    Returns:
        the answers in the order of the prompts, without special tokens.

    Raises:
        EsftError: a number is out of range, or a prompt is empty.
    """
    if max_new_tokens < 1:
        raise EsftError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if batch_tokens < 1:
        raise EsftError(f"--batch-tokens {batch_tokens}: expected at least 1")
    if not all(prompts):
        raise EsftError("a prompt without a token cannot be answered")
    stops = _stops(model, tokenizer)
    answers: dict[int, str] = {}
    with (
        _settings(model, tokenizer, max_new_tokens=max_new_tokens, do_sample=False),
        reporter.task("answering", len(prompts), "row") as task,
    ):
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for group in _groups(model, lengths, batch_tokens):
            found = _answers(model, [prompts[row] for row in group], stops)
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
            answers |= zip(group, texts, strict=True)
            task.advance(len(group), tokens=sum(map(len, found)))
    return [answers[row] for row in range(len(prompts))]


def _groups(model: Any, lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    for group in batches(lengths, batch_tokens):
        if _paddable(model):
            yield group
        else:
            for _, same in groupby(group, key=lambda row: lengths[row]):
                yield list(same)


def _paddable(model: Any) -> bool:
    """Return whether padding on the left leaves a model's answers as they are."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = plain.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or _PADDABLE)
    return (
        not getattr(plain, "_is_stateful", False)
        and layers <= _PADDABLE
        and "position_ids" in signature(plain.forward).parameters
    )


def _answers(model: Any, prompts: Sequence[Sequence[int]], stops: list[int]) -> list[list[int]]:
    """Return the tokens that a model adds to each of B prompts, up to the first stop."""
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
    real_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    output = model.generate(
        input_ids=ids_BS.to(model.device), attention_mask=real_BS.to(model.device)
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    ends = [next((n for n, i in enumerate(ids, 1) if i in stops), len(ids)) for ids in answers]
    return [ids[:end] for ids, end in zip(answers, ends, strict=True)]


@contextlib.contextmanager
def _settings(model: Any, tokenizer: Any, **settings: Any) -> Iterator[None]:
    """Let a model generate by these settings inside the block, without gradients.

    They are in place of the checkpoint's own, not beside them: its repetition penalty, say, would
    make "the likeliest token" untrue.
    """
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig(
        eos_token_id=_stops(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or 0,  # what stands there is not read
        **settings,
    )
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.generation_config = own_settings
        model.train(was_training)


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

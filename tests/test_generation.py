"""Answers against a plain loop over full forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import esft
from esft.errors import DataError, EsftError
from esft.generation import generate_text
from tests.checkpoints import VOCAB, save_tiny
from tests.models import tiny
from tests.toy_tokenizers import CHATML, byte_tokenizer

EOS = 1  # of the byte tokenizer


def a_model(seed: int = 0) -> Any:
    return tiny("qwen3_moe", seed, vocab_size=VOCAB, eos_token_id=EOS)


@torch.no_grad()
def likeliest(
    model: Any, ids: list[int], length: int, stops: tuple[int, ...] = (EOS,)
) -> list[int]:
    answer: list[int] = []
    while len(answer) < length and (not answer or answer[-1] not in stops):
        logits = model(torch.tensor([ids + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    model, tokenizer = a_model(), byte_tokenizer()
    # The checkpoint's own habits do not interfere.
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.do_sample = True
    model.generation_config.max_new_tokens = 2
    kept = model.generation_config.to_dict()
    expected = likeliest(model, [0, *tokenizer("Hello", add_special_tokens=False)["input_ids"]], 12)
    found = generate_text(model, tokenizer, "Hello", max_new_tokens=12)
    assert found == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(found) > 0
    assert model.generation_config.to_dict() == kept


@pytest.mark.parametrize("named_by", ["checkpoint", "tokenizer"])
def test_it_stops_at_every_end_token(named_by: str) -> None:
    model, tokenizer = a_model(), byte_tokenizer()
    prompt = tokenizer("Hello")["input_ids"]
    free = likeliest(model, prompt, 8, stops=())
    end = next(token for token in free[2:] if token not in free[:2])
    length = free.index(end) + 1
    if named_by == "checkpoint":
        model.generation_config.eos_token_id = [7, end]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    answer = generate_text(model, tokenizer, "Hello", max_new_tokens=8)
    whole = tokenizer.decode(free[:length], skip_special_tokens=True)
    assert answer == whole
    assert len(free) > length


def test_sampling_is_seeded_and_leaves_the_random_state_alone() -> None:
    model, tokenizer = a_model(), byte_tokenizer()
    before = torch.random.get_rng_state()

    def draw(seed: int, temperature: float = 1.0) -> str:
        return generate_text(
            model, tokenizer, "Hello", max_new_tokens=20, temperature=temperature, seed=seed
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, 1e-4) == generate_text(model, tokenizer, "Hello", max_new_tokens=20)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_draws_among_all_tokens() -> None:
    model, tokenizer = a_model(), byte_tokenizer(eos=None)
    model.generation_config.eos_token_id = None
    torch.nn.init.zeros_(model.lm_head.weight)  # every token as likely as another
    text = generate_text(model, tokenizer, "Hello", max_new_tokens=400, temperature=1.0)
    assert len(set(text)) > 60  # transformers' own top_k of 50 would leave at most 50


def test_chat_puts_the_prompt_into_the_template() -> None:
    tokenizer = byte_tokenizer(
        ("<|im_start|>", "<|im_end|>"), bos=None, eos="<|im_end|>", pad=None, template=CHATML
    )
    model = a_model()
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(likeliest(model, prompt, 9), skip_special_tokens=True)
    assert generate_text(model, tokenizer, "Hello", max_new_tokens=9, chat=True) == expected


def test_generate_loads_a_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    tokenizer = byte_tokenizer()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = generate_text(model, tokenizer, "2+2=", max_new_tokens=10)
    assert esft.generate(folder, "2+2=", max_new_tokens=10) == expected


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"prompt": ""}, DataError, "--prompt is empty"),
        ({"prompt": " \n"}, DataError, "--prompt is empty"),
        ({"max_new_tokens": 0}, EsftError, "--max-new-tokens 0"),
        ({"temperature": -1.0}, EsftError, "--temperature -1"),
        ({"temperature": float("nan")}, EsftError, "--temperature nan"),
        ({"temperature": float("inf")}, EsftError, "--temperature inf"),
        ({"chat": True}, DataError, "chat template"),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[EsftError], said: str) -> None:
    arguments = {"prompt": "Hello", **options}
    with pytest.raises(kind, match=said):
        generate_text(a_model(), byte_tokenizer(), **arguments)

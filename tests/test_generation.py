"""Answers against a plain loop over full forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import esft
from esft.errors import DataError, EsftError
from esft.generation import generate_text, generate_texts
from tests.checkpoints import VOCAB, save_tiny
from tests.families import small
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


class Numbers:
    """A tokenizer whose text is the ids: no two answers look alike."""

    eos_token_id, pad_token_id = EOS, 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_many_prompts_get_the_answers_that_each_gets_alone(family: str) -> None:
    model = tiny(family, vocab_size=VOCAB, eos_token_id=EOS)
    prompts = prompts_of([3, 17, 8, 8, 1])
    # A stop that some answers come to in the middle, and others do not.
    stop = likeliest(model, prompts[0], 5, stops=())[4]
    model.generation_config.eos_token_id = [EOS, stop]
    expected = [likeliest(model, ids, 9, stops=(EOS, stop)) for ids in prompts]
    assert len({len(answer) for answer in expected}) > 1
    decoded = [" ".join(map(str, answer)) for answer in expected]
    for batch_tokens in (4096, 40, 1):  # all together, a few, each alone
        found = generate_texts(
            model, Numbers(), prompts, max_new_tokens=9, batch_tokens=batch_tokens
        )
        assert found == decoded
    assert model.generation_config.eos_token_id == [EOS, stop]


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_a_model_with_a_state_is_given_no_padding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small(family, vocab_size=VOCAB), Numbers()
    prompts = prompts_of([4, 9, 4, 9, 6])
    masks: list[torch.Tensor] = []
    generate = type(model).generate

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        masks.append(options["attention_mask"])
        return generate(self, *args, **options)

    monkeypatch.setattr(type(model), "generate", watched)
    found = generate_texts(model, tokenizer, prompts, max_new_tokens=5)
    assert [list(mask.shape) for mask in masks] == [[2, 9], [1, 6], [2, 4]]
    assert all(mask.all() for mask in masks)
    for ids, text in zip(prompts, found, strict=True):
        (alone,) = generate_texts(model, tokenizer, [ids], max_new_tokens=5)
        assert text == alone


def test_answers_leave_the_generators_and_the_mode_alone() -> None:
    model, tokenizer = a_model(), byte_tokenizer()
    model.train()
    before = torch.get_rng_state()
    generate_texts(model, tokenizer, prompts_of([4, 6]), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({"max_new_tokens": 0}, [[5]], "--max-new-tokens 0: expected at least 1"),
        ({"batch_tokens": 0}, [[5]], "--batch-tokens 0: expected at least 1"),
        ({}, [[5], []], "a prompt without a token"),
    ],
)
def test_prompts_that_cannot_be_answered(
    options: dict[str, int], prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(EsftError, match=message):
        generate_texts(a_model(), byte_tokenizer(), prompts, **options)

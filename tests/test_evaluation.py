"""Scores of a test set against `model.generate` and a plain float64 loop, row by row."""

import math
import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from esft.data.example import Example
from esft.errors import DataError, EsftError, ModelError
from esft.evaluation import Evaluation, evaluate_model, score_rows
from tests.models import FAMILIES, VOCAB, tiny


def greedy(model: Any, prompt: list[int], length: int, eos: int | None = None) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def answered(prompt: list[int], answer: list[int], number: int) -> Example:
    mask = [False] * len(prompt) + [True] * len(answer)
    return Example(prompt + answer, mask, f"f:{number}")


def rows_right_and_wrong(model: Any) -> list[Example]:
    """Greedy answers of several lengths, and the same with one token changed at any place."""
    drawn = random.Random(0)
    examples = []
    for number in range(24):
        prompt = [drawn.randrange(3, VOCAB) for _ in range(drawn.randrange(1, 12))]
        answer = greedy(model, prompt, drawn.randrange(1, 9))
        if number % 2:
            place = (0, len(answer) // 2, len(answer) - 1)[number % 3]
            answer[place] = (answer[place] + 1) % VOCAB
        examples.append(answered(prompt, answer, number))
    return examples


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_match_is_what_greedy_decoding_writes(family: str) -> None:
    model = tiny(family)
    examples = rows_right_and_wrong(model)
    expected = []
    for example in examples:
        start = example.completion.index(True)
        prompt, answer = example.input_ids[:start], example.input_ids[start:]
        expected.append(greedy(model, prompt, len(answer)) == answer)
    assert expected.count(True) == 12
    # One by one: which rows match; together, in batches that pad: how many.
    found = [evaluate_model(model, [example]).matched == 1 for example in examples]
    assert found == expected
    for batch_tokens in (1, 30, 64, 4096):
        assert evaluate_model(model, examples, batch_tokens=batch_tokens).matched == 12


def test_the_end_token_counts() -> None:
    model = tiny("qwen3_moe")
    prompt = [5, 9, 20]
    free = greedy(model, prompt, 12)
    # Make a later token of the answer the one that ends it.
    length = next(n for n in range(3, 12) if free[n - 1] not in free[: n - 1])
    end = free[length - 1]
    answer = greedy(model, prompt, 12, eos=end)
    assert answer == free[:length]
    assert evaluate_model(model, [answered(prompt, answer, 1)]).exact_match == 1
    too_long = [*answer[:-1], (end + 1) % VOCAB, end]
    assert evaluate_model(model, [answered(prompt, too_long, 1)]).exact_match == 0
    too_short = [*answer[:-2], end]
    assert evaluate_model(model, [answered(prompt, too_short, 1)]).exact_match == 0


def test_every_answer_of_a_conversation_counts() -> None:
    model = tiny("olmoe")
    first = greedy(model, [5, 9, 20], 3)
    history = [5, 9, 20, *first, 7, 30]
    second = greedy(model, history, 2)
    mask = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    right = Example(history + second, mask, "f:1")
    assert evaluate_model(model, [right]).exact_match == 1
    for place in (3, 8):
        wrong = list(right.input_ids)
        wrong[place] = (wrong[place] + 1) % VOCAB
        assert evaluate_model(model, [Example(wrong, mask, "f:1")]).exact_match == 0
    unsupervised = Example([*history, second[0], second[1]], [*mask[:9], False], "f:1")
    assert evaluate_model(model, [unsupervised]).tokens == 4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_loss_is_the_mean_over_answer_tokens(family: str, batch_tokens: int) -> None:
    model = tiny(family)
    examples = rows_right_and_wrong(model)
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(ids).logits[0].double()
        for place in range(1, ids.shape[1]):
            if example.completion[place]:
                losses.append(cross_entropy(logits[place - 1], ids[0, place]).item())
    found = evaluate_model(model, examples, batch_tokens=batch_tokens)
    assert found.tokens == len(losses)
    assert found.rows == len(examples)
    assert found.loss == pytest.approx(math.fsum(losses) / len(losses), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_only_logits_that_are_needed_are_computed() -> None:
    model = tiny("qwen3_moe")
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    examples = [answered([5] * 40, [6, 7], n) for n in range(10)]
    evaluate_model(model, examples, batch_tokens=42 * 5)
    assert shapes == [(5, 2, VOCAB)] * 2


def test_the_mode_and_the_gradients_are_left_alone() -> None:
    model = tiny("mixtral").train()
    evaluate_model(model, [answered([5], [6], 1)])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_that_are_not_finite() -> None:
    model = tiny("qwen3_moe")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match=r"^f:1: .*NaN"):
        evaluate_model(model, [answered([5], [6], 1)])


def test_nothing_to_score() -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(DataError, match="no rows"):
        evaluate_model(model, [])
    with pytest.raises(DataError, match="f:1: no row has an answer token"):
        evaluate_model(model, [Example([5, 6], [True, False], "f:1")])
    with pytest.raises(EsftError, match="--batch-tokens 0"):
        evaluate_model(model, [answered([5], [6], 1)], batch_tokens=0)


def test_perplexity_of_a_known_loss() -> None:
    assert Evaluation(rows=4, tokens=8, matched=1, loss=2.0).perplexity == math.exp(2)
    assert Evaluation(rows=4, tokens=8, matched=1, loss=2.0).exact_match == 0.25


def test_each_row_has_its_own_score() -> None:
    """In the order given, whatever the batches; together they are the whole."""
    model = tiny("qwen3_moe")
    examples = rows_right_and_wrong(model)
    whole = evaluate_model(model, examples)
    for batch_tokens in (4096, 30):
        rows = score_rows(model, examples, batch_tokens=batch_tokens)
        assert [row.where for row in rows] == [example.where for example in examples]
        assert [row.matched for row in rows] == [n % 2 == 0 for n in range(24)]
        for example, row in zip(examples, rows, strict=True):
            alone = evaluate_model(model, [example])
            assert (row.tokens, int(row.matched)) == (alone.tokens, alone.matched)
            assert row.loss == pytest.approx(alone.loss * alone.tokens, abs=1e-4)
        assert math.fsum(row.loss for row in rows) / whole.tokens == pytest.approx(whole.loss)

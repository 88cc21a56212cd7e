"""Scores of a test set against `model.generate` and a plain float64 loop, row by row."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import esft
from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.rows import read_rows
from esft.errors import CheckError, DataError, EsftError, ModelError
from esft.evaluation import Evaluation, evaluate, evaluate_model
from tests.checkpoints import save_tiny
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


def write_data(path: Path, count: int = 6) -> Path:
    lines = [json.dumps({"prompt": f"{n}+{n}=", "completion": str(2 * n)}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


def test_evaluate_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_data(tmp_path / "test.jsonl")
    examples = encode_rows(read_rows(data), AutoTokenizer.from_pretrained(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = evaluate_model(model, examples)
    found = esft.evaluate(checkpoint, data)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert (found.rows, found.tokens, found.matched) == (6, expected.tokens, expected.matched)
    assert evaluate(str(checkpoint), str(data), max_rows=2, dtype="bfloat16").rows == 2
    assert found.to_dict() == {
        "rows": 6,
        "tokens": found.tokens,
        "matched": 0,
        "loss": found.loss,
        "exact_match": 0.0,
        "perplexity": found.perplexity,
    }


def test_evaluate_with_a_delta(checkpoint: Path, tmp_path: Path) -> None:
    delta = save_delta(checkpoint, tmp_path / "delta")
    data = write_data(tmp_path / "test.jsonl")
    esft.merge(checkpoint, delta, tmp_path / "merged")
    alone, merged = evaluate(checkpoint, data), evaluate(tmp_path / "merged", data)
    assert abs(alone.loss - merged.loss) > 1e-3
    assert evaluate(checkpoint, data, delta=delta).loss == pytest.approx(merged.loss, abs=1e-6)
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(CheckError):
        evaluate(other, data, delta=delta)


def save_delta(base: Path, folder: Path) -> Path:
    """Write a delta in which two experts of each layer are different from the base's."""
    from esft.changes import expert_changes
    from esft.delta import write_delta
    from esft.fingerprint import fingerprint
    from esft.loading import load_model
    from esft.moe import moe_layers
    from esft.selection import Selection
    from esft.shards import open_checkpoint

    model = load_model(base)
    chosen = {layer.index: [1, 3] for layer in moe_layers(model)}
    esft.attach(model, Selection(experts=chosen))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    folder.mkdir()
    write_delta(
        folder,
        fingerprint(open_checkpoint(base)),
        expert_changes(model),
        {"method": "esft", "base": {"name": str(base)}},
    )
    return folder


@pytest.mark.parametrize("max_rows", [0, -1])
def test_max_rows(max_rows: int, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--max-rows"):
        evaluate(checkpoint, write_data(tmp_path / "test.jsonl"), max_rows=max_rows)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    tiny("qwen3_moe").save_pretrained(folder)  # 64 tokens only
    with pytest.raises(ModelError, match="259 tokens and the model embeds 64"):
        evaluate(folder, write_data(tmp_path / "test.jsonl"))


def test_perplexity_of_a_known_loss() -> None:
    assert Evaluation(rows=4, tokens=8, matched=1, loss=2.0).perplexity == math.exp(2)
    assert Evaluation(rows=4, tokens=8, matched=1, loss=2.0).exact_match == 0.25

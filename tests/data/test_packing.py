"""Packed, padded and alone: the same loss; blocks, labels and samples as promised."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from esft.data.example import IGNORED, Example
from esft.data.packing import TrainSet, collate, pack, sample, separate
from esft.errors import DataError
from tests.models import FAMILIES, VOCAB, tiny

EOS = 2


def documents(*lengths: int, seed: int = 0) -> list[Example]:
    """Random documents, a third prompt and the rest answer, that end in EOS."""
    drawn = random.Random(seed)
    made = []
    for number, length in enumerate(lengths, start=1):
        ids = [drawn.randrange(VOCAB) for _ in range(length - 1)] + [EOS]
        prompt = length // 3
        mask = [False] * prompt + [True] * (length - prompt)
        made.append(Example(ids, mask, f"f:{number}"))
    return made


LENGTHS = (7, 12, 3, 1, 20, 5, 9, 2)


def items(data: TrainSet) -> list[dict[str, list[int]]]:
    return [data[i] for i in range(len(data))]


def test_blocks_in_the_order_given() -> None:
    a, b, c = documents(3, 4, 2)
    data = pack([a, b, c], 8, pad_id=EOS)
    assert items(data) == [
        {
            "input_ids": [*a.input_ids, *b.input_ids, EOS],
            "labels": [IGNORED, *a.input_ids[1:], IGNORED, *b.input_ids[1:], IGNORED],
            "position_ids": [0, 1, 2, 0, 1, 2, 3, 0],
        },
        {
            "input_ids": [*c.input_ids, *[EOS] * 6],
            "labels": [IGNORED, c.input_ids[1], *[IGNORED] * 6],
            "position_ids": [0, 1, 0, 1, 2, 3, 4, 5],
        },
    ]
    assert (data.rows, data.tokens, data.supervised, data.packed) == (3, 9, 6, True)
    assert data.where == [["f:1", "f:2"], ["f:3"]]


@pytest.mark.parametrize("max_length", [20, 21, 64])
def test_every_document_is_in_a_block_whole_and_in_order(max_length: int) -> None:
    examples = documents(*LENGTHS * 5)
    found = []
    for block in items(pack(examples, max_length, pad_id=0)):
        assert {len(values) for values in block.values()} == {max_length}
        starts = [i for i, place in enumerate(block["position_ids"]) if place == 0]
        for start, end in zip(starts, [*starts[1:], max_length], strict=True):
            assert block["position_ids"][start:end] == list(range(end - start))
            found.append(block["input_ids"][start:end])
    ids = [example.input_ids for example in examples]
    assert [document for document in found if any(document)] == [i for i in ids if any(i)]


def test_labels_follow_loss_on() -> None:
    example = Example([5, 6, 7, 8], [False, False, True, True], "f:1")
    for make in (
        lambda on: pack([example], 4, pad_id=0, loss_on=on),
        lambda on: separate([example], 4, loss_on=on),
    ):
        assert make("completion")[0]["labels"] == [IGNORED, IGNORED, 7, 8]
        assert make("all")[0]["labels"] == [IGNORED, 6, 7, 8]


def test_weights_travel_with_their_tokens() -> None:
    weights = [1.0, 2.0, 0.0, 0.5]
    weighed = Example([5, 6, 7, 8], [False, True, False, True], "f:1", weights)
    plain = Example([9, 3], [True, True], "f:2")
    block = pack([weighed, plain], 8, pad_id=0)
    assert block.weighted
    assert block[0]["loss_weights"] == [*weights, 1.0, 1.0, 0.0, 0.0]
    assert block[0]["labels"] == [IGNORED, 6, IGNORED, 8, IGNORED, 3, IGNORED, IGNORED]
    batch = collate(items(separate([weighed, plain], 8)))
    assert batch["loss_weights"].tolist() == [weights, [1.0, 1.0, 0.0, 0.0]]
    # Of weight 0, no token is learnt, whatever the loss is on.
    assert separate([weighed], 8, loss_on="all")[0]["labels"] == [IGNORED, 6, IGNORED, 8]


@pytest.mark.parametrize("weights", [None, [3.0, 0.0, 1.0, 1.0]])
def test_weights_of_0_and_1_need_no_place(weights: list[float] | None) -> None:
    # The first token has no label, whatever it weighs.
    example = Example([5, 6, 7, 8], [True, False, True, True], "f:1", weights)
    data = separate([example], 8)
    assert not data.weighted
    assert "loss_weights" not in collate(items(data))


def test_rows_that_do_not_fit_are_left_out_whole() -> None:
    examples = documents(3, 9, 4)
    for data in (pack(examples, 8, pad_id=0), separate(examples, 8)):
        assert (data.rows, data.tokens) == (2, 7)
    with pytest.raises(DataError, match="no row fits into max_length 2"):
        pack(examples, 2, pad_id=0)


def test_padding_follows_length_not_value() -> None:
    a, b = documents(5, 3)
    data = separate([a, b], 8)
    assert (data.rows, data.tokens, data.packed) == (2, 8, False)
    batch = collate(items(data), pad_id=EOS)
    assert batch["input_ids"].tolist() == [a.input_ids, [*b.input_ids, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, *b.input_ids[1:], IGNORED, IGNORED]
    assert batch["labels"][0, -1] == EOS
    assert all(t.dtype == torch.int64 for t in batch.values() if isinstance(t, torch.Tensor))


def losses_alone(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Per document: the loss of each supervised token, from a forward pass of its own."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = model(ids, use_cache=False).logits[0, :-1].double()
        each = cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(each[torch.tensor(example.completion[1:], dtype=torch.bool)])
    return losses


def losses_in(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of each labelled token of a batch, in reading order."""
    labels = batch["labels"]
    arguments = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**arguments).logits[:, :-1].double()
    each = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return each[labels[:, 1:].flatten() != IGNORED]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_losses_equal_those_alone(family: str, attention: str) -> None:
    model = tiny(family, attn_implementation=attention)
    assert model.config.use_cache  # the trap: a cache turns the isolation off
    examples = documents(*LENGTHS)
    alone = losses_alone(model, examples)
    assert min(len(losses) for losses in alone) == 0  # a document of one token has no loss
    packed = pack(examples, 24, pad_id=EOS)
    assert len(packed) < len(examples) - 2
    for data in (packed, separate(examples, 24)):
        batch = collate(items(data), pad_id=EOS)
        together = losses_in(model, batch).split([len(losses) for losses in alone])
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_comparison_sees_a_leak() -> None:
    model = tiny("qwen3_moe")
    batch = collate(items(pack(documents(*LENGTHS), 24, pad_id=EOS)))
    del batch["position_ids"]
    leaky = losses_in(model, batch)
    alone = torch.cat(losses_alone(model, documents(*LENGTHS)))
    assert (leaky - alone).abs().max() > 0.05


@pytest.mark.parametrize("packing", [True, False])
def test_a_trainer_takes_the_sets(packing: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny("qwen3_moe")
    examples = documents(*LENGTHS)
    with torch.no_grad():
        expected = torch.cat(losses_alone(model, examples)).mean()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=pack(examples, 24, pad_id=EOS) if packing else separate(examples, 24),
        data_collator=collate,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_sample_hits_the_budget_exactly() -> None:
    examples = documents(*LENGTHS * 3)
    total = sum(LENGTHS) * 3
    for budget in (1, 10, 50, total - 1, total):
        assert sum(len(e.input_ids) for e in sample(examples, budget, seed=0)) == budget
    drawn = sample(examples, 60, seed=3)
    whole = {e.where: e for e in examples}
    assert all(e == whole[e.where] for e in drawn[:-1])
    last = whole[drawn[-1].where]
    length = len(drawn[-1].input_ids)
    assert drawn[-1] == Example(last.input_ids[:length], last.completion[:length], last.where)
    assert len({e.where for e in drawn}) == len(drawn)


def test_sample_of_all_there_is() -> None:
    examples = documents(*LENGTHS)
    drawn = sample(examples, 10_000, seed=0)
    assert sorted(e.where for e in drawn) == [e.where for e in examples]
    assert [e.where for e in drawn] != [e.where for e in examples]


def test_sample_is_seeded() -> None:
    examples = documents(*LENGTHS * 3)
    assert sample(examples, 60, seed=1) == sample(examples, 60, seed=1)
    assert sample(examples, 60, seed=1) != sample(examples, 60, seed=2)


def test_sample_cuts_long_rows() -> None:
    examples = documents(*LENGTHS)
    drawn = sample(examples, 10_000, seed=0, seq_len=5)
    assert sorted(len(e.input_ids) for e in drawn) == sorted(min(n, 5) for n in LENGTHS)


@pytest.mark.parametrize(
    ("examples", "tokens", "seq_len"),
    [([], 5, None), (documents(3), 0, None), (documents(3), 5, 0)],
)
def test_sample_of_nothing(examples: list[Example], tokens: int, seq_len: int | None) -> None:
    with pytest.raises(DataError):
        sample(examples, tokens, 0, seq_len=seq_len)

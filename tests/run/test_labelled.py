"""Logits for labelled tokens only: the loss and every gradient are those of all logits."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, VOCAB, tiny
from torch import Tensor

from esft.errors import ModelError
from esft.run.labelled import check_weighing, labelled_logits, total_weight


def batch(labelled: list[tuple[int, int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (3, 12), generator=generator)
    labels = torch.full_like(ids, -100)
    for row, place in labelled:
        labels[row, place] = ids[row, place]
    return {"input_ids": ids, "labels": labels}


# Answers of different lengths; a label on a first token, which nothing predicts; a row without any.
LABELLED = [(0, 0), (0, 5), (0, 6), (0, 11), (2, 1), (2, 9)]


# granitemoe scales its logits after the output layer.
@pytest.mark.parametrize("family", [*FAMILIES, "granitemoe", "gpt_oss"])
def test_loss_and_gradients_are_those_of_all_logits(family):
    model = tiny(family, **({"logits_scaling": 3.0} if family == "granitemoe" else {}))
    model.requires_grad_(True)
    inputs = batch(LABELLED)
    found = []
    for only_labelled in (False, True):
        model.zero_grad()
        if only_labelled:
            with labelled_logits(model, inputs) as smaller:
                output = model(**smaller, num_items_in_batch=7)
            assert output.logits.shape == (1, 5, VOCAB)  # (0, 0) is predicted by nothing
        else:
            output = model(**inputs, num_items_in_batch=7)
        output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((output.loss, torch.cat([grad.flatten() for grad in grads])))
    (loss, grad), (loss_again, grad_again) = found
    assert torch.isclose(loss, loss_again, rtol=1e-6)
    assert (grad - grad_again).norm() < 1e-6 * grad.norm()


def test_the_model_is_left_as_it_was():
    model = tiny("olmoe")
    inputs = batch(LABELLED)
    with labelled_logits(model, inputs):
        pass
    assert model(**inputs).logits.shape == (3, 12, VOCAB)


def test_without_labels_or_with_another_loss_the_batch_stays():
    model = tiny("olmoe")
    ids = batch([])["input_ids"]
    with labelled_logits(model, {"input_ids": ids}) as same:
        assert model(**same).logits.shape == (3, 12, VOCAB)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with labelled_logits(model, batch(LABELLED)) as same:
        assert model(**same).logits.shape == (3, 12, VOCAB)


WEIGHTS = {(0, 5): 0.5, (0, 6): 2.0, (0, 11): 0.25, (2, 1): 1.0, (2, 9): 3.0}


def weighed_batch() -> dict[str, Tensor]:
    inputs = batch(LABELLED)
    # Where no label is, and on a first token, a weight means nothing.
    inputs["loss_weights"] = torch.full((3, 12), 7.0)
    for place, weight in WEIGHTS.items():
        inputs["loss_weights"][place] = weight
    return inputs


@pytest.mark.parametrize("items", [None, 11.5])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "granitemoe"])
def test_weighed_loss_and_gradients_are_those_of_a_loop(family, items):
    model = tiny(family)
    model.requires_grad_(True)
    inputs = weighed_batch()
    log_p = model(inputs["input_ids"]).logits.double().log_softmax(-1)
    loss = sum(
        -weight * log_p[row, place - 1, inputs["input_ids"][row, place]]
        for (row, place), weight in WEIGHTS.items()
    ) / (sum(WEIGHTS.values()) if items is None else items)
    expected = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    with labelled_logits(model, inputs) as smaller:
        assert "loss_weights" not in smaller
        found = model(**smaller, **options).loss
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found, model.model.embed_tokens.weight)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    # The next batch may have no weights.
    plain = batch(LABELLED)
    with labelled_logits(model, plain) as smaller:
        unweighed = model(**smaller).loss
    assert torch.isclose(unweighed, model(**plain).loss)


def test_weights_of_a_step_are_summed_over_its_batches():
    assert total_weight([weighed_batch(), weighed_batch()]).item() == 2 * sum(WEIGHTS.values())


def test_a_loss_of_its_own_cannot_be_weighed():
    model = tiny("olmoe")
    check_weighing(model)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(ModelError, match=r"^olmoe: .* leave `weight` out"):
        check_weighing(model)
    with (
        pytest.raises(ModelError, match=r"^olmoe: "),
        labelled_logits(model, weighed_batch()),
    ):
        pass

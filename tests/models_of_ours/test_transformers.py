"""What transformers expects of a model's classes: one case a model and behaviour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from esft.data.isolation import check_isolation
from esft.models import MODELS
from esft.models.decoder import counted
from esft.run.labelled import labelled_logits
from tests.models_of_ours.tiny_models import EXPERTS, NAMES, VOCAB, ids, tiny

every = pytest.mark.parametrize("name", NAMES)


def test_every_model_is_tested() -> None:
    assert set(NAMES) == {config.model_type for config, _, _ in MODELS}


@every
def test_the_auto_classes_know_it(name: str, tmp_path: Any) -> None:
    config = AutoConfig.for_model(name)
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
    own, decoder, language_model = next(kinds for kinds in MODELS if kinds[0] is type(config))
    with torch.device("meta"):
        assert type(AutoModel.from_config(tiny(name).config)) is decoder
        assert type(AutoModelForCausalLM.from_config(tiny(name).config)) is language_model
    assert own.model_type == name


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bitwise(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    model = tiny(name).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
    for parameter in loaded.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


@every
def test_the_loss_is_the_cross_entropy_of_the_next_token(name: str) -> None:
    model, rows = tiny(name), ids()
    labels = rows.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = model(rows, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.aux_loss is None
    with torch.no_grad():
        with_routers = model(rows, labels=labels, output_router_logits=True)
    assert with_routers.loss == out.loss + with_routers.aux_loss
    assert with_routers.aux_loss != 0


@every
def test_esft_s_trainer_computes_logits_for_labelled_tokens_only(name: str) -> None:
    """With the factors and caps behind the output layer."""
    model, rows = tiny(name), ids()
    labels = rows.where(torch.arange(24) % 5 == 1, -100)
    with torch.no_grad(), labelled_logits(model, {"input_ids": rows, "labels": labels}) as batch:
        found = model(**batch)
        assert found.logits.shape == (1, 10, VOCAB)
    with torch.no_grad():
        assert torch.allclose(found.loss, model(rows, labels=labels).loss, rtol=1e-6)


def test_of_a_mask_that_has_the_cache_too_the_end_counts() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert torch.equal(counted(mask, 2), torch.tensor([[1, 1], [1, 0]]))
    assert counted(None, 2) is None
    assert counted(mask[:, None, None], 2) is None  # prepared for attention: tells of no padding


@every
def test_embeddings_instead_of_ids_and_logits_of_the_last_tokens_only(name: str) -> None:
    model, rows = tiny(name), ids()
    with torch.no_grad():
        logits = model(rows).logits
        embedded = model.get_input_embeddings()(rows)
        assert torch.equal(model(inputs_embeds=embedded).logits, logits)
        last = model(rows, logits_to_keep=3).logits
    assert last.shape == (2, 3, VOCAB)
    assert torch.allclose(last, logits[:, -3:], atol=1e-5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(rows, inputs_embeds=embedded)


@every
def test_no_token_sees_a_later_one(name: str) -> None:
    model, rows = tiny(name), ids()
    changed = rows.clone()
    changed[:, 15:] = ids(seed=8)[:, 15:]
    with torch.no_grad():
        before, after = model(rows).logits, model(changed).logits
    # Rows are grouped by expert: the same sum in another order.
    assert torch.allclose(before[:, :15], after[:, :15], atol=1e-5)
    assert (before[:, 15:] - after[:, 15:]).abs().max() > 1e-2


@every
def test_a_cache_changes_nothing(name: str) -> None:
    """Token by token, and a prompt at once with the rest in two parts."""
    model, rows = tiny(name), ids()
    with torch.no_grad():
        expected = model(rows, use_cache=False).logits
        for cuts in (range(1, 25), (10, 11, 24)):
            cache, start, found = None, 0, []
            for end in cuts:
                out = model(rows[:, start:end], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, end
                found.append(out.logits)
            assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-5)
    assert cache.get_seq_length() == 24


@every
def test_generation_is_greedy_decoding(name: str) -> None:
    model, prompt = tiny(name), ids(length=6)
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    row = prompt
    with torch.no_grad():
        for _ in range(8):
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, row)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, row = tiny(name), ids(rows=1, length=9)
    pad = torch.zeros(1, 5, dtype=row.dtype)
    real = torch.ones_like(row)
    parts = [(pad, row), (pad, real)] if side == "left" else [(row, pad), (real, pad)]
    padded, mask = (torch.cat(part, dim=1) for part in parts)
    # The batch has an unpadded row too.
    padded = torch.cat([padded, ids(rows=1, length=14, seed=9)])
    mask = torch.cat([mask, torch.ones(1, 14, dtype=mask.dtype)])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(row, labels=row, output_router_logits=True)
        found = model(padded, attention_mask=mask, position_ids=position).logits[:1]
        alone = model(
            padded[:1],
            attention_mask=mask[:1],
            position_ids=position[:1],
            labels=padded[:1].where(mask[:1].bool(), -100),
            output_router_logits=True,
        )
    assert torch.allclose(found[mask[:1].bool()], expected.logits[0], atol=1e-5)
    assert torch.allclose(alone.aux_loss, expected.aux_loss, rtol=1e-5)


@every
def test_packed_rows_stay_apart(name: str) -> None:
    check_isolation(tiny(name))
    model = tiny(name)
    first, second = ids(1, 9), ids(1, 12, seed=9)
    places = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), position_ids=places, use_cache=False)
        assert torch.allclose(packed.logits[:, :9], model(first).logits, atol=1e-5)
        assert torch.allclose(packed.logits[:, 9:], model(second).logits, atol=1e-5)


@every
def test_every_experts_implementation_computes_the_same(name: str) -> None:
    model, rows = tiny(name), ids()
    found = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        loss = model(rows, labels=rows).loss
        loss.backward()
        # A copy: the gradients of a frozen or unused weight are None.
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == {n for n, _ in model.named_parameters()}
        found[implementation] = loss.detach(), grads
    loss, grads = found.pop("eager")
    for other, others in found.values():
        assert torch.isclose(other, loss, rtol=1e-5)
        for key, grad in grads.items():
            assert (others[key] - grad).norm() <= 1e-5 * grad.norm(), key


@every
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids(), labels=ids(), output_router_logits=True).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in grads[0].items():
        assert torch.equal(grads[1][key], grad), key
        assert grad.norm() > 0, key


@every
def test_what_it_returns_on_request(name: str) -> None:
    model = tiny(name, attn_implementation="eager")
    with torch.no_grad():
        out = model(ids(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert len(out.attentions) == model.config.num_hidden_layers
    assert all(x.shape == (2, 24, 32) for x in out.hidden_states)
    assert all(torch.allclose(x.sum(-1), torch.ones(()), atol=1e-5) for x in out.attentions)


@every
def test_bf16_is_near_fp32(name: str) -> None:
    """With all experts in use: where one of two is chosen, rounding can choose the other."""
    everything = {"num_experts_per_tok": EXPERTS, "attention_num_experts_per_tok": 4}
    model, rows = tiny(name, **everything), ids()
    with torch.no_grad():
        expected = model(rows).logits
        found = model.to(torch.bfloat16)(rows).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()

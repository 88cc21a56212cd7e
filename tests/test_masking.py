"""Experts switched off: routers choose as if these did not exist, in every family."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import esft
from esft.errors import EsftError, ModelError, SelectionError
from esft.evaluation import evaluate_model
from esft.masking import mask_model, masked
from esft.moe import moe_layers
from esft.profiling import profile_model
from esft.ranking import draw
from esft.selection import select
from tests.checkpoints import save_tiny
from tests.families import CONFIGS, small
from tests.models import EXPERTS, FAMILIES, TOP_K, tiny
from tests.models_of_ours import tiny_models
from tests.test_profiling import normalises, rows

OFF = [5, 0, 2]
LEFT = [expert for expert in range(EXPERTS) if expert not in OFF]


def everywhere(model: nn.Module) -> dict[int, list[int]]:
    return {layer.index: OFF for layer in moe_layers(model)}


def decisions(model: nn.Module) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Note what each router got and chose in the latest forward pass."""
    seen: dict[int, Any] = {}
    for layer in moe_layers(model):
        assert layer.router is not None
        layer.router.register_forward_pre_hook(
            lambda _module, args, i=layer.index: seen.__setitem__(i, [args[0]])
        )
        layer.experts.register_forward_pre_hook(
            lambda _module, args, i=layer.index: seen[i].extend(args[1:3])
        )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_loop(family: str) -> None:
    """One token at a time, in Python's floats: probabilities over all, the best K of those left."""
    model = tiny(family)
    seen = decisions(model)
    with masked(model, everywhere(model)), torch.no_grad():
        model(torch.arange(3, 43)[None])
    for layer in moe_layers(model):
        hidden, index, weight = seen[layer.index]
        matrix = layer.router.weight.double().tolist()  # type: ignore[union-attr, operator]
        changed = 0
        for state, ids, gates in zip(
            hidden.reshape(40, -1).double().tolist(), index.tolist(), weight.tolist(), strict=True
        ):
            powers = [math.exp(sum(w * h for w, h in zip(r, state, strict=True))) for r in matrix]
            probabilities = [power / sum(powers) for power in powers]
            best = sorted(LEFT, key=lambda i, p=probabilities: -p[i])[:TOP_K]
            whole = sum(probabilities[i] for i in best) if normalises(model) else 1.0
            assert set(ids) == set(best)
            for expert, gate in zip(ids, gates, strict=True):
                assert gate == pytest.approx(probabilities[expert] / whole, abs=1e-6)
            changed += set(best) != set(sorted(range(EXPERTS), key=lambda i: -powers[i])[:TOP_K])
        assert changed > 5


def test_a_router_that_chooses_groups_first() -> None:
    """DeepSeek-V3: sigmoid scores; the group with the best two experts; its best K."""
    model = small("deepseek_v3").float()
    seen = decisions(model)
    with masked(model, everywhere(model)), torch.no_grad():
        model(torch.arange(3, 43)[None])
    for layer in moe_layers(model):
        hidden, index, _ = seen[layer.index]
        router: Any = layer.router
        logits = hidden.reshape(40, -1) @ router.weight.T
        for scores, ids in zip(logits.sigmoid().tolist(), index.tolist(), strict=True):
            # Two groups of four, one of which is taken: 1 and 3, or 4, 6 and 7.
            groups = [[1, 3], [4, 6, 7]]
            best_two = [sum(sorted((scores[i] for i in g), reverse=True)[:2]) for g in groups]
            group = groups[best_two.index(max(best_two))]
            assert set(ids) == set(sorted(group, key=lambda i, s=scores: -s[i])[:TOP_K])


def without(model: PreTrainedModel) -> PreTrainedModel:
    """Return a smaller model that never had the experts: of a family that divides by their sum."""
    config = type(model.config)(**model.config.to_dict() | {"num_local_experts": len(LEFT)})
    smaller = AutoModelForCausalLM.from_config(config).eval()
    state = {
        name: value[LEFT] if value.shape[0] == EXPERTS and ".mlp." in name else value
        for name, value in model.state_dict().items()
    }
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_loss_is_that_of_a_model_without_these_experts(family: str) -> None:
    model, examples = tiny(family), rows()
    with masked(model, everywhere(model)):
        found = evaluate_model(model, examples)
    expected = evaluate_model(without(model), examples)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert abs(found.loss - evaluate_model(model, examples).loss) > 1e-3


# Families whose routers do not choose by `topk` of all experts' scores: by a sparse mixer, and in
# the first layers by the token's id.
OTHER_ROUTERS = ("deepseek_v4", "phimoe")
OUTSIDE_THE_INTERFACE = ("dbrx", "jetmoe", "llama4_text", "longcat_flash")


def model_of(family: str) -> PreTrainedModel:
    if family in tiny_models.NAMES:
        return tiny_models.fresh(family).eval()
    return tiny(family) if family in OUTSIDE_THE_INTERFACE else small(family).float()


@pytest.mark.parametrize(
    "family",
    sorted({*CONFIGS, *OTHER_ROUTERS, *OUTSIDE_THE_INTERFACE, *tiny_models.NAMES}),
)
def test_every_family(family: str) -> None:
    model = model_of(family)
    tokens = torch.arange(3, 23)[None]
    chosen: dict[int, set[int]] = {}
    for layer in moe_layers(model):
        layer.layout.observe(
            lambda index, _weight, i=layer.index: chosen.setdefault(i, set()).update(
                index.flatten().tolist()
            )
        )
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        chosen.clear()
        if family in OTHER_ROUTERS:
            with (
                pytest.raises(ModelError, match=r"chose an expert that is switched off"),
                masked(model, everywhere(model)),
            ):
                model(tokens, use_cache=False)
            return
        with masked(model, everywhere(model)):
            without_them = model(tokens, use_cache=False).logits
        assert sorted(chosen) == [layer.index for layer in moe_layers(model)]
        assert not any(ids & set(OFF) for ids in chosen.values())
        assert torch.isfinite(without_them).all()
        assert not torch.allclose(before, without_them, atol=1e-6)
        # Nothing of it stays behind.
        assert torch.equal(model(tokens, use_cache=False).logits, before)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_no_hook_stays_behind() -> None:
    model = tiny("mixtral")
    before = hooks(model)
    with masked(model, everywhere(model)):
        assert hooks(model) > before
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), masked(model, everywhere(model)):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_only_the_layers_that_are_named() -> None:
    model = tiny("qwen3_moe")
    seen = decisions(model)
    with masked(model, {1: OFF, 2: []}), torch.no_grad():
        model(torch.arange(3, 43)[None])
    assert not set(OFF) & set(seen[1][1].flatten().tolist())
    assert set(OFF) & set(seen[0][1].flatten().tolist())
    assert set(OFF) & set(seen[2][1].flatten().tolist())


def test_best_and_random_experts_are_switched_off() -> None:
    model, examples = tiny("olmoe"), rows()
    scores = profile_model(model, examples)
    found = mask_model(model, examples, scores, top=3, metric="gate", draws=3, seed=4)
    assert found.whole == evaluate_model(model, examples)
    with masked(model, select(scores, metric="gate", top_n=3).experts):
        assert found.best == evaluate_model(model, examples)
    assert found.best != found.whole
    for seed, score in zip((4, 5, 6), found.random, strict=True):
        with masked(model, {layer: draw(seed, layer, EXPERTS, 3) for layer in scores.layers}):
            assert score == evaluate_model(model, examples)
    losses = [score.loss for score in found.random]
    assert found.random_loss == pytest.approx(sum(losses) / 3)
    assert found.random_spread == pytest.approx(statistics.stdev(losses))
    assert mask_model(model, examples, scores, top=3, draws=1).random_spread is None


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    model, examples = tiny("mixtral"), rows()
    scores = profile_model(model, examples)
    with pytest.raises(SelectionError, match=r"--top 7: layer 0 has 8 .* at most 6"):
        mask_model(model, examples, scores, top=7)
    with pytest.raises(EsftError, match="--draws 0"):
        mask_model(model, examples, scores, top=1, draws=0)
    other = profile_model(tiny("mixtral", num_local_experts=4), examples)
    with pytest.raises(SelectionError, match=r"another model: .* 4 experts in layer 0 .* 8 exp"):
        mask_model(model, examples, other, top=1)
    with pytest.raises(SelectionError, match=r"8 experts in layer 0 and this one has no routed"):
        mask_model(tiny("deepseek_v2"), examples, scores, top=1)


def test_without_scores_the_data_itself_is_scored(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny", "olmoe")
    data = tmp_path / "test.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}:", "completion": "{n * n}"}}\n' for n in range(30)))
    found = esft.mask(checkpoint, data, top=2, draws=1)
    esft.profile(checkpoint, data).write(tmp_path / "scores.json")
    assert esft.mask(checkpoint, data, top=2, draws=1, scores=tmp_path / "scores.json") == found
    assert esft.mask(checkpoint, data, top=2, draws=1, max_rows=5).whole.rows == 5

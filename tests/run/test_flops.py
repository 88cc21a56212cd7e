"""Operations by formula, against PyTorch's counter on passes that are really made.

The counter sees matrix products as they are called. Of attention on a CPU it sees the eager one
only, and of experts, transformers' eager loop; the kernels' `grouped_mm` it is told about here.
What it cannot see are elementwise operations, norms and softmax, which the formula leaves out too.
So the two agree to the last operation, but for what each test says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tiny
from models import HIDDEN, LAYERS, TOP_K, VOCAB, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import esft
from esft.data.example import IGNORED
from esft.data.packing import TrainSet
from esft.layer_scores import LayerScores
from esft.loading import load_model
from esft.methods import LoraMethod
from esft.methods.hot_lora import HotLoraMethod
from esft.moe import moe_layers
from esft.recipe_sections import LoraSpec
from esft.run.flops import Work, selected_shares, training_flops
from esft.scores import Scores
from esft.selection import Selection

B, S, RANK = 2, 24, 4
IDS = torch.randint(3, VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
WORK = Work(tokens=B * S, labelled=B * S, context=S, passes=1)
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v2")


def _model(family: str, **overrides: Any) -> PreTrainedModel:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: PreTrainedModel = tiny(family, **(eager | overrides)).train()
    return model


def _grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Count rows times matrices `[M, k] x [G, k, n]`, or outer products `[p, M] x [M, q]`."""
    return 2 * a[0] * a[1] * b[-1]


def _counted(model: nn.Module) -> int:
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped})
    with counter:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return _total(counter)


def _total(counter: FlopCounterMode) -> int:
    """Return what was counted, less the table of rotary angles: transformers 5.17 multiplies it."""
    angles = sum(
        sum(found.values())
        for module, found in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    )
    return int(counter.get_total_flops()) - angles


def _shares(model: PreTrainedModel, chosen: Sequence[int]) -> dict[int, float]:
    """Return the share of the routers' choices on this batch that are among some experts."""
    found: dict[int, float] = {}
    hooks = []
    for layer in moe_layers(model):

        def seen(index: torch.Tensor, _: torch.Tensor, at: int = layer.index) -> None:
            found[at] = torch.isin(index, torch.tensor(chosen)).double().mean().item()

        hooks.append(layer.layout.observe(seen))
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_full_fine_tuning_is_counted_exactly(family: str) -> None:
    model = _model(family).requires_grad_(True)
    assert training_flops(model, moe_layers(model), WORK) == _counted(model)


def test_tied_embeddings_are_multiplied_by_once() -> None:
    model = _model("qwen3_moe", tie_word_embeddings=True).requires_grad_(True)
    assert training_flops(model, moe_layers(model), WORK) == _counted(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lowest", [1, 2])
def test_selected_experts_are_counted_exactly(family: str, lowest: int) -> None:
    """Nothing flows back below the lowest layer that trains, nor into it but to its experts."""
    model = _model(family)
    layers, shares = moe_layers(model), _shares(model, [1, 3])
    selection = Selection({layer.index: [1, 3] for layer in layers if layer.index >= lowest})
    esft.attach(model, selection)
    found = training_flops(model, layers, WORK, shares)
    assert found == pytest.approx(_counted(model), abs=1)  # shares are fractions


def test_a_layer_without_selected_experts_computes_no_weight_gradient() -> None:
    model = _model("qwen3_moe")
    layers, shares = moe_layers(model), _shares(model, [5])
    esft.attach(model, Selection({0: [5], 1: [], 2: [5]}))
    found = training_flops(model, layers, WORK, shares)
    assert found == pytest.approx(_counted(model), abs=1)


def test_shared_experts_that_train_are_counted() -> None:
    """In the lowest block the gradient of the block's input is counted, and not computed."""
    model = _model("deepseek_v2")
    layers, shares = moe_layers(model), _shares(model, [1])
    esft.attach(model, Selection({1: [1], 2: [1]}), shared_experts=True)
    found = training_flops(model, layers, WORK, shares)
    shared = dict(model.named_parameters())
    first = [p for name, p in shared.items() if "layers.1.mlp" in name and "up_proj" in name]
    first += [p for name, p in shared.items() if "layers.1.mlp" in name and "gate" in name]
    unneeded = sum(2 * B * S * p.numel() for p in first if p.dim() == 2)
    assert found == pytest.approx(_counted(model) + unneeded, abs=1)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_lora_is_counted_but_for_what_peft_does_twice(family: str) -> None:
    """PEFT multiplies the factors of stacked experts out twice a pass; the formula counts once.

    And in the lowest block, attention's first layer, the formula counts the gradient of what comes
    in, which its q, k and v have no use for.
    """
    model = _model(family)
    layers = moe_layers(model)
    stacks = sum(shape.numel() for layer in layers for shape in layer.layout.shapes().values())
    prepared = LoraMethod(LoraSpec(r=RANK)).prepare(model)
    twice = 2 * RANK * stacks
    unneeded = 3 * 2 * B * S * (HIDDEN * HIDDEN + HIDDEN * RANK)
    assert training_flops(prepared, layers, WORK) == _counted(prepared) - twice + unneeded


def test_recomputing_the_layers_adds_their_forward_pass() -> None:
    """The counter runs it; transformers recomputes whole layers, but not the output."""
    model = _model("qwen3_moe").requires_grad_(True)
    layers = moe_layers(model)
    options = {"use_reentrant": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    again = Work(B * S, B * S, S, 1, recomputed=True)
    assert training_flops(model, layers, again) == _counted(model)


def test_more_tokens_and_passes_cost_in_proportion() -> None:
    """Products with tokens grow with tokens; factors of stacks with passes; scores with context."""
    model = _model("qwen3_moe")
    layers = moe_layers(model)
    prepared = LoraMethod(LoraSpec(r=RANK)).prepare(model)

    def flops(tokens: int, context: int, passes: int) -> float:
        return training_flops(prepared, layers, Work(tokens, tokens, context, passes))

    once = flops(48, 24, 1)
    assert flops(96, 24, 2) == 2 * once
    factors = flops(48, 24, 2) - once
    stacks = sum(shape.numel() for layer in layers for shape in layer.layout.shapes().values())
    assert factors == 3 * 2 * RANK * stacks
    # Two heads of 16 for q and for v, forward and twice that backward, 48 tokens, 3 layers.
    assert flops(48, 25, 1) - once == 48 * LAYERS * 2 * 2 * (16 + 16) * 3


def test_only_labelled_tokens_meet_the_output_layer() -> None:
    model = _model("qwen3_moe").requires_grad_(True)
    layers = moe_layers(model)
    less = training_flops(model, layers, Work(B * S, 10, S, 1))
    assert training_flops(model, layers, WORK) - less == 3 * 2 * (B * S - 10) * HIDDEN * VOCAB


def test_a_sliding_window_bounds_the_context() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = _model("gpt_oss", layer_types=kinds, sliding_window=8).requires_grad_(True)
    long, short = (Work(B * S, B * S, context, 1) for context in (1000, 8))
    more = training_flops(model, moe_layers(model), long) - training_flops(
        model, moe_layers(model), short
    )
    assert more == B * S * (1000 - 8) * 2 * 2 * (16 + 16) * 3  # in one layer of three


def test_without_scores_all_experts_are_chosen_equally_often() -> None:
    model = _model("qwen3_moe")
    layers = moe_layers(model)
    esft.attach(model, Selection({0: [1, 3], 1: [2]}))
    even = {0: 2 / 8, 1: 1 / 8}
    assert training_flops(model, layers, WORK) == training_flops(model, layers, WORK, even)


def test_nothing_trains_nothing_is_done() -> None:
    model = _model("qwen3_moe").requires_grad_(False)
    assert training_flops(model, moe_layers(model), WORK) == 0


def test_shares_are_those_of_the_token_scores() -> None:
    scores = Scores(
        {
            0: LayerScores(4, 2, 8, token=[0.5, 0.25, 0.25, 0.0], gate=[1.0, 0.0, 0.0, 0.0]),
            1: LayerScores(4, 2, 8, token=[0.2, 0.2, 0.0, 0.0], gate=[0.0, 0.0, 1.0, 0.0]),
        }
    )
    found = selected_shares(scores, Selection({0: [1, 2], 1: [0]}))
    assert found == {0: 0.5, 1: 0.5}


def test_work_is_read_from_the_training_set() -> None:
    """Two rows of 2 and 6 tokens, of which 1 and 3 have labels: most tokens see a row of 6."""
    items = [
        {"input_ids": [1] * length, "labels": [IGNORED] * (length - known) + [1] * known}
        for length, known in ((2, 1), (6, 3))
    ]
    data = TrainSet(items, [["a"], ["b"]], packed=False, tokens=8)
    assert Work.on(data, tokens=80, passes=20) == Work(80, 40.0, (2 * 2 + 6 * 6) / 8, 20)


def test_the_textbook_rule_is_near() -> None:
    """6 operations for each active parameter and token (arXiv 2001.08361), short of attention."""
    model = _model("qwen3_moe").requires_grad_(True)
    layers = moe_layers(model)
    per_expert = sum(shape[1:].numel() for shape in layers[0].layout.shapes().values())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - VOCAB * HIDDEN
    active = matrices + LAYERS * TOP_K * per_expert
    assert training_flops(model, layers, Work(100, 100, 0, 1)) == 6 * active * 100


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_hot_lora_is_counted_exactly(family: str) -> None:
    """Its factors cost in each pass, and the whole weight's gradient in each token's experts."""
    model = _model(family)
    layers, shares = moe_layers(model), _shares(model, [1, 3])
    selection = Selection({layer.index: [1, 3] for layer in layers[1:]})
    prepared = HotLoraMethod(selection, LoraSpec(r=RANK)).prepare(model)
    found = training_flops(prepared, layers, WORK, shares)
    assert found == pytest.approx(_counted(prepared), abs=1)


def _attended(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Count `[B, heads, S, d]` queries, keys and values."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attended_backward(_: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    return 2 * _attended(q, k, v)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of two steps of four rows of one length, so that no batch is padded."""
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": save_tiny(tmp_path / "base"),
        "data": {"train": tmp_path / "rows.jsonl", "max_length": 32, "packing": False},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    }


def test_a_run_tells_the_operations_of_all_its_steps(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The counter watches the whole of `esft.train`."""
    known = {
        torch.ops.aten._grouped_mm: _grouped,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attended,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attended_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        result = esft.train(recipe | {"method": "full"}, tmp_path / "run")
    assert result.flops == _total(counter)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["flops"] == result.flops


@pytest.mark.parametrize("method", ["esft", "hot-lora"])
def test_a_run_knows_how_often_its_experts_were_chosen(
    recipe: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """And how often factors were multiplied out: in 2 steps of 2 passes each."""
    rule = {"selection": {"p": 0.4}}
    result = esft.train(recipe | rule | {"method": method}, tmp_path / "run")
    selection = Selection.read(tmp_path / "run" / "selection.json")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]
    shares = {
        layer: sum(scores[str(layer)]["token"][expert] for expert in ids)
        for layer, ids in selection.experts.items()
    }
    model = load_model(recipe["model"])
    layers = moe_layers(model)
    if method == "esft":
        esft.attach(model, selection)
    else:
        HotLoraMethod(selection, LoraSpec()).prepare(model)
    length = 12  # the beginning, `0:`, eight letters, the end
    work = Work(tokens=8 * length, labelled=8 * 9, context=length, passes=4)
    assert result.flops == pytest.approx(training_flops(model, layers, work, shares))

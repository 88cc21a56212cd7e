"""`esft.train`: what it changes, what it writes, and what it leaves behind when it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import esft
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.errors import EsftError
from esft.recipe import read_recipe
from tests.checkpoints import save_tiny
from tests.models import FAMILIES, LAYERS

ROWS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bf16, as real ones are: what is trained in fp32 is rounded in the delta."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "tiny", "deepseek_v2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with 2 to 9 supervised tokens each."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: Path, train: Path, **changes: Any) -> dict[str, Any]:
    """A short run; `changes` are keys of the recipe, or of its training section."""
    training = {
        "max_steps": 8,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "seed": 0,
    }
    sections = {"method", "selection", "lora", "param_dtype", "dtype"}
    return {
        "model": base,
        "data": {"train": train, "max_length": 32} | changes.pop("data", {}),
        **{key: changes.pop(key) for key in list(changes) if key in sections},
        "training": training | changes,
    }


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def selected(run: Path) -> dict[int, list[int]]:
    experts = json.loads((run / "selection.json").read_text())["experts"]
    return {int(layer): ids for layer, ids in experts.items()}


@pytest.mark.parametrize("method", ["esft", "random", "lora", "hot-lora", "full"])
def test_a_run(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    wanted = recipe(base, data, method=method, save_strategy="steps", save_steps=8)
    wanted["data"]["eval"] = data
    result = esft.train(wanted, run)
    files = {"README.md", "checkpoints", "delta", "metrics.jsonl", "recipe.yaml", "result.json"}
    picks = method in ("esft", "random", "hot-lora")
    assert {item.name for item in run.iterdir()} == files | (
        {"scores.json", "selection.json", "routing_before.json", "routing_after.json"}
        if picks
        else set()
    )
    assert (result.steps, result.method, result.delta) == (8, method, run / "delta")
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    assert result.train_loss == pytest.approx(sum(losses) / 8, abs=1e-4)
    card = (run / "README.md").read_text()
    assert f"specialised by {method}" in card
    assert f"{result.trained:,}" in card
    assert "{{" not in card

    esft.verify(base, run / "delta")
    esft.merge(base, run / "delta", merged)
    # What the last checkpoint holds is what was trained, whatever the delta says.
    state = load_file(run / "checkpoints" / "step-000008" / "state.safetensors")
    trained = {
        name.removeprefix("parameter/"): tensor
        for name, tensor in state.items()
        if name.startswith("parameter/")
    }
    assert result.trained == sum(tensor.numel() for tensor in trained.values())
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype="bfloat16").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").state_dict()
    if method == "full":
        assert loaded.keys() == trained.keys()
        for name, tensor in trained.items():
            assert torch.equal(loaded[name], tensor.bfloat16()), name
    if picks:
        assert_only_selected_experts_differ(weights(base), weights(merged), selected(run))
        for layer, experts in selected(run).items():
            for stack in ("gate_up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts"
                rows = loaded[f"{name}.{stack}"][experts]
                if method != "hot-lora":
                    assert torch.equal(rows, trained[f"{name}.esft.trainable.{stack}"].bfloat16())
    if method == "hot-lora":
        assert all(".esft.low_rank." in name for name in trained)
        assert all(name.split(".")[-2] in ("left", "right") for name in trained)
    if method == "lora":
        assert all("lora_" in name for name in trained)
        # Every linear layer, shared experts and the dense first layer among them, and all experts.
        still = {name for name in loaded if torch.equal(loaded[name], before[name])}
        assert {re.sub(r"model\.(layers\.\d\.)?", "", name) for name in still} == {
            "embed_tokens.weight",
            "lm_head.weight",
            "norm.weight",
            "mlp.gate.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.kv_a_layernorm.weight",
        }
        adapted = [name for name in loaded if name not in still]
        for part in ("layers.0.mlp.up_proj", "layers.1.mlp.shared_experts.down_proj", "q_proj"):
            assert any(part in name for name in adapted), part
        for layer in range(1, LAYERS):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            moved = loaded[name] != before[name]
            assert moved.flatten(1).any(dim=1).sum() >= 4  # experts that no token chose stay
    assert any(not torch.equal(loaded[name], before[name]) for name in loaded)


def assert_only_selected_experts_differ(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], chosen: dict[int, list[int]]
) -> None:
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in chosen.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }


def test_random_is_a_control_of_the_same_size(base: Path, data: Path, tmp_path: Path) -> None:
    sizes = []
    for method in ("esft", "random"):
        wanted = recipe(base, data, method=method, selection={"p": 0.5, "seed": 3}, max_steps=1)
        esft.train(wanted, tmp_path / method)
        sizes.append({k: len(v) for k, v in selected(tmp_path / method).items()})
    assert sizes[0] == sizes[1]
    assert selected(tmp_path / "esft") != selected(tmp_path / "random")
    rule = json.loads((tmp_path / "random" / "selection.json").read_text())["rule"]
    assert rule["random"] == 3


def test_train_selects_what_profile_and_select_do(base: Path, data: Path, tmp_path: Path) -> None:
    options = {"tokens": 60, "seq_len": 9, "seed": 5, "count": "completion"}
    scores = esft.profile(base, data, **options)
    by_hand = esft.select(scores, metric="gate", budget="20kB")
    wanted = recipe(
        base, data, selection={**options, "metric": "gate", "budget": "20kB"}, max_steps=1
    )
    esft.train(wanted, tmp_path / "run")
    assert selected(tmp_path / "run") == by_hand.experts
    written = esft.Scores.read(tmp_path / "run" / "scores.json")
    assert (written.layers, written.model) == (scores.layers, scores.model)


def trained_by_hand(
    base: Path, data: Path, chosen: dict[int, list[int]], *, steps: int, lr: float, loss_on: str
) -> dict[str, torch.Tensor]:
    """Gradient descent over all rows at once, row by row, in float64, by autograd alone."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = encode_rows(read_rows(data), tokenizer)
    stacks = {
        f"model.layers.{layer}.mlp.experts.{stack}": experts
        for layer, experts in chosen.items()
        for stack in ("gate_up_proj", "down_proj")
    }
    parameters = dict(model.named_parameters())
    for _ in range(steps):
        model.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for example in examples:
            ids = torch.tensor(example.input_ids)
            learnt = torch.tensor(example.completion) | (loss_on == "all")
            logits = model(ids[None]).logits[0, :-1]
            losses = cross_entropy(logits, ids[1:], reduction="none")
            total = total + losses[learnt[1:]].sum()
            count += int(learnt[1:].sum())
        (total / count).backward()
        with torch.no_grad():
            for name, experts in stacks.items():
                parameters[name][experts] -= lr * parameters[name].grad[experts]
    return {name: parameters[name].detach() for name in stacks}


@pytest.mark.parametrize(
    ("batch", "accumulated", "packing", "loss_on"),
    [
        (ROWS, 1, False, "completion"),
        (3, 4, False, "completion"),
        (ROWS, 1, False, "all"),
        (3, 4, False, "all"),
        (ROWS, 1, True, "completion"),
        (1, 8, True, "completion"),
        (1, 8, True, "all"),
    ],
)
def test_a_step_is_gradient_descent_on_the_mean_over_all_supervised_tokens(
    base32: Path,
    data: Path,
    tmp_path: Path,
    batch: int,
    accumulated: int,
    packing: bool,
    loss_on: str,
) -> None:
    # Plain gradient descent, unclipped: with AdamW a wrong scale of the loss would not show.
    # Each step sees all rows, however they are cut into batches, so their order is no matter.
    chosen = {0: [1, 6], 2: [4]}
    (tmp_path / "selection.json").write_text(json.dumps({str(k): v for k, v in chosen.items()}))
    wanted = recipe(
        base32,
        data,
        selection=tmp_path / "selection.json",
        data={"packing": packing, "loss_on": loss_on, "max_length": 24},
        optim="sgd",
        max_grad_norm=0,
        learning_rate=0.1,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )
    esft.train(wanted, tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["epoch"] == 3
    esft.merge(base32, tmp_path / "run" / "delta", tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base32).state_dict()
    expected = trained_by_hand(base32, data, chosen, steps=3, lr=0.1, loss_on=loss_on)
    for name, tensor in expected.items():
        moved = (tensor - before[name]).norm()
        assert moved > 5e-3
        assert (found[name] - tensor).norm() < 1e-5 * moved + 1e-6, name


def test_gradient_checkpointing_changes_nothing(base32: Path, data: Path, tmp_path: Path) -> None:
    for name, on in (("without", False), ("with", True)):
        wanted = recipe(base32, data, max_steps=2, gradient_checkpointing=on)
        esft.train(wanted, tmp_path / name)
    found = [
        load_file(tmp_path / n / "delta" / "esft_delta.safetensors") for n in ("without", "with")
    ]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_a_run_is_reproducible(base: Path, data: Path, tmp_path: Path) -> None:
    short = {"max_steps": 3, "per_device_train_batch_size": 1}
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)  # whatever came before
        esft.train(recipe(base, data, **short), tmp_path / name)
    files = [
        (tmp_path / n / "delta" / "esft_delta.safetensors").read_bytes() for n in ("one", "two")
    ]
    assert files[0] == files[1]
    esft.train(recipe(base, data, **short | {"seed": 1}), tmp_path / "three")
    assert (tmp_path / "three" / "delta" / "esft_delta.safetensors").read_bytes() != files[0]


def test_the_recipe_of_a_run_repeats_it(base: Path, data: Path, tmp_path: Path) -> None:
    esft.train(recipe(base, data, max_steps=2), tmp_path / "run")
    esft.train(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (
        tmp_path / "run" / "recipe.yaml"
    ).read_text()
    files = [tmp_path / n / "delta" / "esft_delta.safetensors" for n in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_default_learning_rates_are_the_paper_s(base: Path, data: Path, tmp_path: Path) -> None:
    for method, rate in {"esft": 1e-5, "lora": 1e-4, "full": 3e-5}.items():
        wanted = recipe(base, data, method=method, max_steps=1)
        del wanted["training"]["learning_rate"]
        esft.train(wanted, tmp_path / method)
        assert metrics(tmp_path / method)[0]["learning_rate"] == rate
        resolved = read_recipe(tmp_path / method / "recipe.yaml")
        assert resolved.training["learning_rate"] == rate


def test_small_updates_are_not_lost_in_the_parameters(
    base: Path, data: Path, tmp_path: Path
) -> None:
    # In bf16 a step of 1e-5 rounds away against most weights of this size; in fp32 it does not.
    changed = {}
    for dtype in ("float32", "bfloat16"):
        wanted = recipe(base, data, param_dtype=dtype, learning_rate=1e-5, save_steps=8)
        esft.train(wanted | {"dtype": "bfloat16"}, tmp_path / dtype)
        run = tmp_path / dtype / "delta" / "esft_delta.safetensors"
        before = weights(base)
        pairs = [(before[name], tensor) for name, tensor in load_file(run).items()]
        changed[dtype] = sum(int((a != b).sum()) for a, b in pairs)
    assert changed["float32"] > changed["bfloat16"]


def test_evaluation_while_training(base32: Path, data: Path, tmp_path: Path) -> None:
    wanted = recipe(
        base32, data, data={"eval": data}, eval_strategy="steps", eval_steps=3, max_steps=6
    )
    result = esft.train(wanted, tmp_path / "run")
    logged = [line for line in metrics(tmp_path / "run") if "eval_exact_match" in line]
    assert [line["step"] for line in logged] == [3, 6]
    # An fp32 base: the delta holds the trained weights unrounded.
    found = esft.evaluate(base32, data, delta=tmp_path / "run" / "delta")
    assert result.evaluation is not None
    assert logged[-1]["eval_exact_match"] == found.exact_match == result.evaluation.exact_match
    assert logged[-1]["eval_loss"] == pytest.approx(found.loss, abs=1e-5)
    assert logged[0]["eval_loss"] > logged[-1]["eval_loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_merged_is_the_model_with_its_adapter(data: Path, tmp_path: Path, family: str) -> None:
    from peft import PeftModel

    base32 = save_tiny(tmp_path / "base", family)
    esft.train(recipe(base32, data, method="lora", lora={"r": 4, "alpha": 8}), tmp_path / "run")
    esft.merge(base32, tmp_path / "run" / "delta", tmp_path / "merged")
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base32).eval()
        before = plain(ids).logits.clone()
        adapter = PeftModel.from_pretrained(plain, tmp_path / "run" / "delta").eval()
        expected = adapter(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (expected - before).abs().max() > 0.5
    # W x + B (A x) and (W + B A) x are equal but for fp32 rounding through three layers.
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


def test_tied_embeddings_stay_tied(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    assert "lm_head.weight" not in weights(folder)
    result = esft.train(recipe(folder, data, method="full", max_steps=2), tmp_path / "run")
    assert result.trained == sum(tensor.numel() for tensor in weights(folder).values())
    merged = esft.merge(folder, result.delta, tmp_path / "merged")
    assert esft.verify(folder, result.delta, merged).merged == len(weights(folder))
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(merged)[name], weights(folder)[name])


def test_a_run_that_diverges_is_stopped(base: Path, data: Path, tmp_path: Path) -> None:
    for name, steps in (("logged", 1), ("unlogged", 100)):
        wanted = recipe(base, data, method="full", learning_rate=1e20, logging_steps=steps)
        with pytest.raises(EsftError, match="the run has diverged and is stopped; try a lower"):
            esft.train(wanted, tmp_path / name)
        assert not (tmp_path / name / "delta").exists()


def test_a_run_that_diverges_leaves_its_last_good_checkpoint(
    base: Path, data: Path, tmp_path: Path
) -> None:
    # The rate rises from 0: the first steps are harmless.
    rising = {"lr_scheduler_type": "linear", "warmup_steps": 8, "logging_steps": 100}
    wanted = recipe(
        base,
        data,
        **rising,
        learning_rate=1e38,
        save_strategy="steps",
        save_steps=1,
        max_grad_norm=0,
    )
    with pytest.raises(EsftError, match=r"^step \d+: .*; the run has diverged and is stopped"):
        esft.train(wanted, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    for folder in kept:
        for name, tensor in load_file(folder / "state.safetensors").items():
            assert not name.startswith("parameter/") or tensor.isfinite().all()


def test_a_folder_that_is_in_use_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    with pytest.raises(EsftError, match="run: the folder exists and is not empty"):
        esft.train(recipe(base, data), tmp_path / "run")
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["mine"]


def dense(folder: Path) -> Path:
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "DENSE"}, "llama: this model is dense"),
        ({"model": "MISSING"}, "MISSING"),
        ({"data": {"train": "none.jsonl"}}, r"none\.jsonl: no such data file"),
        ({"data": {"train": "broken.jsonl"}}, r"broken\.jsonl:2: not JSON"),
        ({"data": {"train": "unanswered.jsonl"}}, r"unanswered\.jsonl:1: a line without an answ"),
        ({"data": {"eval": "none.jsonl"}}, r"none\.jsonl: no such data file"),
        ({"data": {"eval": "broken.jsonl"}}, r"broken\.jsonl:2: not JSON"),
        ({"data": {"max_length": 2}}, "no row fits into max_length 2"),
        ({"selection": "empty.json"}, r"empty\.json: the selection is empty"),
        ({"selection": "none.json"}, r"none\.json: no such selection file"),
        ({"selection": "layer9.json"}, "the selection has layer 9"),
        ({"selection": "expert9.json"}, "the selection has expert 9 in layer 1"),
        ({"selection": {"layers": "7"}}, "--layers 7: no MoE layer in 7"),
        ({"selection": {"top_n": 99}}, "--top-n 99"),
        ({"selection": {"budget": "1B"}}, "--budget 1B selects nothing"),
        ({"selection": {"p": 1.5}}, r"^selection\.p: p must be above 0"),
        (
            {"method": "lora", "lora": {"target_modules": ["o_proj", "q_prj"]}},
            r'^lora\.target_modules: nothing in this model is called q_prj; did you mean "q_proj"',
        ),
        (
            {"method": "lora", "lora": {"target_parameters": ["mlp.experts.none"]}},
            r"^lora\.target_parameters: nothing in this model is called mlp\.experts\.none",
        ),
        (
            {"training": {"optim": "none"}},
            "^training.optim: none is not among the optimizers that are known",
        ),
        ({"training": {"optim": "lomo"}}, "^training.optim: lomo is not among"),
        ({"training": {"lr_scheduler_type": "none"}}, "^training: "),
        (
            {"training": {"report_to": "none_such"}},
            "^training.report_to: none_such: not a reporter",
        ),
        ({"device": "cuda:77"}, "cuda:77: not usable here"),
    ],
)
def test_what_is_refused_leaves_nothing(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = data.read_text()
    (tmp_path / "broken.jsonl").write_text(rows.splitlines()[0] + '\n{"prompt": \n')
    (tmp_path / "unanswered.jsonl").write_text('{"prompt": "a"}\n')
    for name, experts in {"empty": {}, "layer9": {"9": [0]}, "expert9": {"1": [9]}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"experts": experts}))
    if change.get("model") == "DENSE":
        change = {"model": dense(tmp_path / "dense")}
    wanted: dict[str, Any] = {"model": base, "data": {"train": str(data), "max_length": 32}}
    for key, value in change.items():
        wanted[key] = {**wanted.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(EsftError, match=message):
        esft.train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_tokenizer_of_another_model_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    special = [f"<{n}>" for n in range(60)]
    folder = save_tiny(tmp_path / "base", special=["<s>", "</s>", "<pad>", *special])
    with pytest.raises(EsftError, match="the tokenizer has 319 tokens and the model embeds 300"):
        esft.train(recipe(folder, data), tmp_path / "run")
    assert not (tmp_path / "run").exists()

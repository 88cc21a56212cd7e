"""What a run says of itself at its end: how much moved, and how the routers' choices changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import esft
from esft.layer_scores import LayerScores
from esft.run.drift import ExpertDrift, compare
from esft.run.movement import Moved
from esft.scores import Scores
from esft.selection import Selection
from tests.checkpoints import save_tiny


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drift")
    base = save_tiny(folder / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": base,
        "selection": {"metric": "gate", "p": 0.3},
        "data": {"train": folder / "rows.jsonl", "max_length": 32},
        "training": {"max_steps": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 4},
    }


@pytest.mark.parametrize("from_file", [False, True])
def test_a_run_measures_what_it_did(
    setting: dict[str, Any], tmp_path: Path, from_file: bool
) -> None:
    if from_file:
        scores = esft.profile(setting["model"], setting["data"]["train"])
        esft.select(scores, metric="gate", p=0.3).write(tmp_path / "selection.json")
        setting = setting | {"selection": tmp_path / "selection.json"}
    result = esft.train(setting, tmp_path / "run")
    merged = esft.merge(setting["model"], result.delta, tmp_path / "merged")

    delta = load_file(result.delta / "esft_delta.safetensors")
    before = load_file(setting["model"] / "model.safetensors")
    changed = sum(int((tensor != before[name]).sum()) for name, tensor in delta.items())
    total = sum(tensor.numel() for tensor in delta.values())
    assert result.stored_moved == Moved(changed, total)
    # The base is bf16: not every change in fp32 is one there, but every one there is one in fp32.
    assert result.trained == total == result.moved.total
    assert changed < result.moved.changed <= total

    chosen = Selection.read(tmp_path / "run" / "selection.json").experts
    found = [
        esft.profile(model, setting["data"]["train"]).layers for model in (setting["model"], merged)
    ]
    shares = [
        [
            sum(layers[layer].gate[expert] for expert in ids) / sum(layers[layer].gate)
            for layer, ids in chosen.items()
        ]
        for layers in found
    ]
    assert result.drift is not None
    assert result.drift.before == pytest.approx(sum(shares[0]) / len(chosen), abs=1e-6)
    # The merged experts are rounded to bf16, those that were measured are not.
    assert result.drift.after == pytest.approx(sum(shares[1]) / len(chosen), abs=3e-4)
    assert abs(result.drift.after - result.drift.before) > 1e-3
    # What was compared lies in the folder: the same figures follow from the files.
    files = [tmp_path / "run" / f"routing_{when}.json" for when in ("before", "after")]
    again = compare(*map(Scores.read, files), Selection.read(tmp_path / "run" / "selection.json"))
    assert (again.before, again.after) == (result.drift.before, result.drift.after)
    assert again.largest == result.drift.largest
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{result.drift.before:.3f} before" in card
    assert f"{100 * result.moved.share:.1f} % of them" in card
    told = json.loads(json.dumps(result.to_dict()))
    assert told["drift"]["after"] == result.drift.after
    assert told["stored_moved"] == {"changed": changed, "total": total, "share": changed / total}


@pytest.mark.parametrize(
    ("method", "routing_drift"), [("esft", False), ("lora", True), ("full", True)]
)
def test_what_is_not_measured(
    setting: dict[str, Any], tmp_path: Path, method: str, routing_drift: bool
) -> None:
    wanted = setting | {"method": method, "routing_drift": routing_drift}
    if method != "esft":
        del wanted["selection"]
    wanted["training"] = setting["training"] | {"max_steps": 1}
    result = esft.train(wanted, tmp_path / "run")
    assert result.drift is None
    assert not list((tmp_path / "run").glob("routing_*"))
    assert (result.stored_moved is None) == (method == "lora")
    assert (result.moved is None) == (method == "full")
    assert result.moved is None or result.moved.changed > 0


def test_drift_by_hand() -> None:
    def scores(*gates: list[float]) -> Scores:
        layers = {
            layer: LayerScores(4, 2, 10, token=gate, gate=gate) for layer, gate in enumerate(gates)
        }
        return Scores(layers=layers, model={}, sample={"tokens": 10})

    before = scores([0.1, 0.2, 0.1, 0.1], [0.4, 0.0, 0.0, 0.4])
    after = scores([0.2, 0.2, 0.3, 0.3], [0.2, 0.2, 0.2, 0.2])
    found = compare(before, after, Selection({0: [1, 0], 1: [3]}), seconds=2.5)
    # Shares, layer 0: 0.4 and 0.2 of 0.5 in all, then 0.2 and 0.2; layer 1: 0.5, then 0.25.
    assert found.before == pytest.approx((0.6 + 0.5) / 2)
    assert found.after == pytest.approx((0.4 + 0.25) / 2)
    assert found.mean == pytest.approx((0.2 + 0.0 + 0.25) / 3)
    assert found.largest == ExpertDrift(1, 3, 0.5, 0.25)
    assert (found.tokens, found.seconds) == (10, 2.5)


def test_only_what_changed_has_moved() -> None:
    from esft.run.movement import StartingPoint

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.5, 1 / 3]))  # the second is no bf16 number
    start = StartingPoint(model)
    assert start.moved(model) == Moved(0, 8)
    with torch.no_grad():
        model[1].weight[0, 1] += 1e-6
        model[1].bias[1] += 1e-7
        model[0].weight += 1
    assert start.moved(model) == Moved(2, 8)

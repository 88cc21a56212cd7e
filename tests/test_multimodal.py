"""Models that read images too, on text alone: load, attach, train, delta, merge, plain reload.

Their scores are checked in tests/test_gates.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from esft.changes import expert_changes
from esft.delta import attach_delta, write_delta
from esft.experts import attach, detach
from esft.fingerprint import fingerprint
from esft.loading import load_model
from esft.merging import merge, verify
from esft.moe import inspect, moe_layers
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.command import esft_json
from tests.multimodal import WRAPPERS, wrapper
from tests.toy_tokenizers import byte_tokenizer
from tests.training_loop import batches, train_steps

PICKED = {1: [5, 0], 2: [3]}


def cloned(model: Any) -> Any:
    for parameter in model.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    return model.eval()


def train_and_merge(base: Path, out: Path) -> tuple[Any, Path]:
    """Return the trained model, and where base and delta were merged."""
    model = attach(cloned(load_model(base, dtype="checkpoint")), Selection(experts=PICKED))
    train_steps(model, 3)
    found = fingerprint(open_checkpoint(base))
    (out / "delta").mkdir(parents=True)
    write_delta(out / "delta", found, expert_changes(model, found), {"method": "esft", "base": {}})
    return detach(model).eval(), merge(base, out / "delta", out / "merged")


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_whole_chain(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    wrapper(family).to(torch.bfloat16).save_pretrained(base)
    assert inspect(base).architecture == type(wrapper(family)).__name__
    trained, merged = train_and_merge(base, tmp_path)
    assert verify(base, tmp_path / "delta", merged).changed > 0
    again = cloned(AutoModelForImageTextToText.from_pretrained(merged, dtype="auto"))
    before = cloned(AutoModelForImageTextToText.from_pretrained(base, dtype="auto")).state_dict()
    expected, moved = trained.state_dict(), set()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        if not torch.equal(tensor, before[name]):
            moved.add(name)
    layers = {layer.index: layer for layer in moe_layers(again)}
    assert moved == {
        f"{layers[index].name}.{name}" for index in PICKED for name in layers[index].layout.shapes()
    }
    for index, experts in PICKED.items():
        for name in layers[index].layout.shapes():
            path = f"{layers[index].name}.{name}"
            changed = (expected[path] != before[path]).flatten(1).any(1).nonzero().flatten()
            assert changed.tolist() == sorted(experts)
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained(input_ids=ids).logits)
    attached = attach_delta(cloned(load_model(base, dtype="checkpoint")), base, tmp_path / "delta")
    for name, tensor in attached.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_stacks_that_are_the_other_way_round_on_disk(tmp_path: Path) -> None:
    """As in Qwen3-VL-MoE's own checkpoints, which transformers transposes when it loads them."""
    one, other = tmp_path / "one", tmp_path / "other"
    model = wrapper("qwen3_vl_moe").to(torch.bfloat16)
    for folder in (one, other):
        model.save_pretrained(folder)
    file = other / "model.safetensors"
    tensors = load_file(file)
    turned = {name: t for name, t in tensors.items() if ".mlp.experts." in name}
    assert turned
    tensors |= {name: t.transpose(1, 2).contiguous() for name, t in turned.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    results = {}
    for base in (one, other):
        trained, merged = train_and_merge(base, tmp_path / f"of {base.name}")
        again = cloned(AutoModelForImageTextToText.from_pretrained(merged, dtype="auto"))
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
        delta = tmp_path / f"of {base.name}" / "delta"
        attached = attach_delta(cloned(load_model(base, dtype="checkpoint")), base, delta)
        for name, tensor in attached.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
        results[base.name] = load_file(merged / "model.safetensors")
    for name, tensor in results["one"].items():
        twin = results["other"][name]
        assert torch.equal(tensor, twin.transpose(1, 2) if name in turned else twin), name


def test_square_stacks_are_not_turned(tmp_path: Path) -> None:
    """Shapes do not tell which way round these are: transformers loads them as they are."""
    base = tmp_path / "base"
    model = wrapper("qwen3_vl_moe", moe_intermediate_size=16)  # 2 I = H
    model.to(torch.bfloat16).save_pretrained(base)
    trained, merged = train_and_merge(base, tmp_path)
    again = cloned(AutoModelForImageTextToText.from_pretrained(merged, dtype="auto"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_the_commands(tmp_path: Path) -> None:
    base, data, run = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run"
    tokenizer = byte_tokenizer()
    wrapper("aria", vocab_size=300, pad_token_id=tokenizer.pad_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    texts = ["the sea", "a tree in a wood", "12 + 30", "one, two, three"]
    data.write_text("".join(json.dumps({"prompt": t, "completion": t[::-1]}) + "\n" for t in texts))
    assert esft_json("inspect", base)["model_type"] == "aria_text"
    options = ["--data", data, "--steps", "2", "--p", "0.3", "--set", "data.max_length=32"]
    trained = esft_json("train", base, *options, "--out", run)
    assert trained["delta"] == str(run / "delta")
    esft_json("merge", base, run / "delta", "--out", tmp_path / "merged")
    found = esft_json("verify", base, run / "delta", "--merged", tmp_path / "merged")
    assert found["ok"]
    assert esft_json("eval", tmp_path / "merged", "--data", data)["rows"] == 4

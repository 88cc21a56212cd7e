"""Delta and merge: the merged checkpoint is the trained model, bit for bit, for anyone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.changes import expert_changes
from esft.delta import attach_delta, read_delta, write_delta
from esft.errors import CheckError, DeltaError, ModelError, OutputError
from esft.experts import attach
from esft.fingerprint import fingerprint
from esft.merging import merge, verify
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.deltas import PICKED, load, save_base, train_delta
from tests.models import FAMILIES
from tests.training_loop import batches

PLAIN = Path(__file__).parent / "plain_transformers.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, a delta and the trained model, made once."""
    root = tmp_path_factory.mktemp("trained")
    base = save_base(root / "base")
    return base, root / "delta", train_delta(base, root / "delta")


def assert_same_weights(model, other) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("layout", ["one file", "shards", "fused on disk"])
def test_merge_is_the_trained_model(tmp_path, family, layout):
    options = {
        "one file": {},
        "shards": {"max_shard_size": "20KB"},
        "fused on disk": {"save_original_format": False},
    }[layout]
    base = save_base(tmp_path / "base", family, **options)
    assert (layout == "shards") == (len(open_checkpoint(base).files) > 1)
    trained = train_delta(base, tmp_path / "delta", {1: [5, 0], 2: [3]})
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    reloaded = load(merged)
    assert_same_weights(reloaded, trained)
    moved = [
        n
        for n, t in load(base).state_dict().items()
        if not torch.equal(t, reloaded.state_dict()[n])
    ]
    assert moved  # otherwise this test shows nothing
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trained(ids).logits)
    counted = verify(base, tmp_path / "delta", merged)
    assert counted.merged == counted.tensors == len(open_checkpoint(base).entries)


def test_plain_transformers_loads_the_merge_without_esft(trained, tmp_path):
    base, delta, model = trained
    merge(base, delta, tmp_path / "merged")
    ids = batches(1)[0]
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    out = tmp_path / "out.safetensors"
    command = [
        sys.executable,
        str(PLAIN),
        str(tmp_path / "merged"),
        str(tmp_path / "ids.safetensors"),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = load_file(out)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(ids).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[f"weights.{name}"], tensor), name


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "granitemoe"])
def test_attaching_a_delta_to_a_loaded_model_gives_the_trained_model(tmp_path, family):
    base = save_base(tmp_path / "base", family)
    trained = train_delta(base, tmp_path / "delta")
    model = attach_delta(load(base), base, tmp_path / "delta")
    assert_same_weights(model, trained)


def test_the_delta_holds_the_selected_experts_and_nothing_else(trained):
    _, delta, _ = trained
    names = set(load_file(delta / "esft_delta.safetensors"))
    assert names == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in PICKED.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }


def test_a_resharded_base_is_accepted(trained, tmp_path):
    base, delta, model = trained
    load(base).save_pretrained(tmp_path / "cut", max_shard_size="30KB")
    merged = merge(tmp_path / "cut", delta, tmp_path / "merged")
    assert_same_weights(load(merged), model)


def test_a_base_with_other_values_is_refused_by_the_tensor(trained, tmp_path):
    base, delta, _ = trained
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for check in (
        lambda: merge(tmp_path / "other", delta, tmp_path / "merged"),
        lambda: verify(tmp_path / "other", delta),
        lambda: attach_delta(load(tmp_path / "other"), tmp_path / "other", delta),
    ):
        with pytest.raises(CheckError, match=r"model\.norm\.weight has other values"):
            check()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("family", "match"),
    [("olmoe", r"self_attn\.k_norm\.weight has shape"), ("mixtral", "is missing from it")],
)
def test_a_base_of_another_architecture_is_refused(trained, tmp_path, family, match):
    with pytest.raises(CheckError, match=match):
        merge(save_base(tmp_path / "b", family), trained[1], tmp_path / "merged")


def test_a_base_of_another_dtype_is_refused(trained, tmp_path):
    base, delta, _ = trained
    load(base).float().save_pretrained(tmp_path / "fp32")
    with pytest.raises(CheckError, match="dtype F32"):
        merge(tmp_path / "fp32", delta, tmp_path / "merged")


def test_merging_twice_onto_a_merge_or_in_place_is_refused(trained, tmp_path):
    base, delta, _ = trained
    merged = merge(base, delta, tmp_path / "merged")
    with pytest.raises(CheckError, match="has the delta's values already"):
        merge(merged, delta, tmp_path / "again")
    with pytest.raises(OutputError, match="not empty"):
        merge(base, delta, merged)
    with pytest.raises(OutputError, match="not empty"):
        merge(base, delta, base)


def test_verify_finds_a_flipped_bit_in_the_merge(trained, tmp_path):
    base, delta, _ = trained
    merged = merge(base, delta, tmp_path / "merged")
    file = merged / "model.safetensors"
    entry = open_checkpoint(merged).entries["model.layers.1.mlp.experts.0.up_proj.weight"]
    data = bytearray(file.read_bytes())
    data[entry.start + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckError, match=r"model\.layers\.1\.mlp\.experts\.0\.up_proj"):
        verify(base, delta, merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"merged: tensor model\.norm\.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), r"base: tensor extra is missing"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
            r"model\.norm\.weight is F32 \[32\], BF16 \[32\] in the base",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].view(4, 8)}),
            r"model\.norm\.weight is BF16 \[4, 8\], BF16 \[32\] in the base",
        ),
    ],
    ids=["one fewer", "one more", "other dtype", "other shape"],
)
def test_verify_finds_a_merge_of_another_layout(trained, tmp_path, change, message):
    base, delta, _ = trained
    merged = merge(base, delta, tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckError, match=message):
        verify(base, delta, merged)


def test_a_base_with_one_more_tensor_is_refused(trained, tmp_path):
    base, delta, _ = trained
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for check in (
        lambda: merge(tmp_path / "other", delta, tmp_path / "merged"),
        lambda: verify(tmp_path / "other", delta),
    ):
        with pytest.raises(CheckError, match=r"tensor model\.extra\.weight is not in the base"):
            check()
    assert not (tmp_path / "merged").exists()


def test_what_lies_beside_the_weights_is_kept_but_neither_pickles_nor_the_card(trained, tmp_path):
    base, delta, _ = trained
    shutil.copytree(base, tmp_path / "base")
    kept = {"tokenizer.json": b"{}", "LICENSE": b"free", "vocab.txt": b"a\nb"}
    pickles = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "a.ckpt")
    for name, data in {**kept, **dict.fromkeys(pickles, b"\x80\x04.")}.items():
        (tmp_path / "base" / name).write_bytes(data)
    (tmp_path / "base" / "README.md").write_text("# The base's card\n")
    (tmp_path / "base" / "logs").mkdir()
    merged = merge(tmp_path / "base", delta, tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {
        *(path.name for path in base.iterdir()),
        *kept,
        "README.md",
    }
    for name, data in kept.items():
        assert (merged / name).read_bytes() == data
    card = (merged / "README.md").read_text()
    assert "base's card" not in card
    assert "tiny" in card


def damage_flip(folder: Path) -> None:
    data = bytearray((folder / "esft_delta.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "esft_delta.safetensors").write_bytes(data)


def damage_truncate(folder: Path) -> None:
    data = (folder / "esft_delta.safetensors").read_bytes()
    (folder / "esft_delta.safetensors").write_bytes(data[: len(data) // 2])


def damage_missing_base(folder: Path) -> None:
    (folder / "esft_base.json").unlink()


def damage_no_manifest(folder: Path) -> None:
    (folder / "esft_config.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "esft_config.json").write_text('{"format": "esft-delta/2"')


def damage_newer_format(folder: Path) -> None:
    manifest = json.loads((folder / "esft_config.json").read_text())
    (folder / "esft_config.json").write_text(json.dumps(manifest | {"format": "esft-delta/9"}))


def damage_escape(folder: Path) -> None:
    manifest = json.loads((folder / "esft_config.json").read_text())
    names = ("../base/config.json", "adapter_config.json", "adapter_model.safetensors")
    manifest["files"] = {name: {"bytes": 1, "sha256": ""} for name in names}
    (folder / "esft_config.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_flip, r"esft_delta.safetensors: tensor model\.layers\.\S+: damaged: its sha256"),
        (damage_truncate, "esft_delta.safetensors: this weights file is damaged"),
        (damage_missing_base, "esft_base.json: no such file of the delta"),
        (damage_no_manifest, "no esft_config.json"),
        (damage_manifest, "esft_config.json:1: not JSON"),
        (damage_newer_format, "esft-delta/9"),
        (damage_escape, "points outside"),
    ],
)
def test_a_damaged_delta_is_refused(trained, tmp_path, damage, message):
    base, delta, _ = trained
    shutil.copytree(delta, tmp_path / "delta")
    damage(tmp_path / "delta")
    with pytest.raises(DeltaError, match=message):
        merge(base, tmp_path / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_diverged_model_is_not_written(tmp_path):
    base = save_base(tmp_path / "base")
    model = attach(load(base), Selection(experts={1: [0]}))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0, 0] = float("nan")
    (tmp_path / "delta").mkdir()
    with pytest.raises(DeltaError, match=r"layers\.1\.mlp\.experts\.0\.\w+\.weight has NaN"):
        write_delta(
            tmp_path / "delta",
            fingerprint(open_checkpoint(base)),
            expert_changes(model),
            {"method": "esft"},
        )


def test_a_pickled_base_is_refused(trained, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickled weights"):
        merge(tmp_path, trained[1], tmp_path / "merged")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(trained, tmp_path, name):
    base, delta, _ = trained
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"points outside|is missing"):
        merge(tmp_path / "base", delta, tmp_path / "merged")


def test_read_delta_reports_method_and_rows(tmp_path):
    base = save_base(tmp_path / "base", "gpt_oss")
    train_delta(base, tmp_path / "delta")
    delta = read_delta(tmp_path / "delta")
    assert delta.method == "esft"
    assert delta.rows["model.layers.1.mlp.experts.down_proj_bias"] == (5, 0)

"""Several deltas in one merge, and a merge undone: bytes are compared with a plain loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import CheckError, DeltaError, OutputError
from esft.exporting import export
from esft.merging import merge, verify
from esft.shards import open_checkpoint
from esft.unmerging import unmerge
from tests.deltas import save_base, train_delta

# Expert 5 of layer 1 is in both: what they make of it, differs.
PICKED: dict[str, dict[int, list[int]]] = {
    "law": {1: [5, 0], 2: [3]},
    "sql": {1: [7, 5]},
    "code": {2: [6]},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# One tensor an expert; all experts of a layer in one tensor, with biases; several files.
@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "shards"])
def made(request, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp(request.param)
    options: dict[str, Any] = {"max_shard_size": "20KB"} if request.param == "shards" else {}
    family = "qwen3_moe" if request.param == "shards" else request.param
    base = save_base(root / "base", family, **options)
    for name, experts in PICKED.items():
        train_delta(base, root / name, experts)
    return {"base": base} | {name: root / name for name in PICKED}


def expected(made: dict[str, Path], names: list[str], tmp_path: Path, on_conflict: str):
    """Merge one by one and put together expert by expert, by the value of each number."""
    base = weights(made["base"])
    merged = [weights(merge(made["base"], made[n], tmp_path / f"alone-{n}")) for n in names]
    result = {}
    for name, old in base.items():
        value = old.clone()
        changed = [m[name] for m in merged if not torch.equal(m[name], old)]
        if len(changed) == 1:
            value = changed[0]
        elif changed:
            # Where only one of them moved a number, that one counts.
            fused = value.dim() == 3 or name.endswith("bias")
            for row in range(old.shape[0]) if fused else [slice(None)]:
                movers = [c[row] for c in changed if not torch.equal(c[row], old[row])]
                if not movers:
                    continue
                mean = torch.stack(movers).double().mean(0).to(old.dtype)
                value[row] = movers[-1] if on_conflict == "last" else mean
        result[name] = value
    return result


@pytest.mark.parametrize("on_conflict", ["last", "mean"])
def test_deltas_that_conflict(made, tmp_path, on_conflict):
    names = ["law", "sql", "code"]
    folders = [made[name] for name in names]
    out = merge(made["base"], folders, tmp_path / "merged", on_conflict=on_conflict)
    found, wanted = weights(out), expected(made, names, tmp_path, on_conflict)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert verify(made["base"], folders, out, on_conflict=on_conflict).merged == len(wanted)
    other = "mean" if on_conflict == "last" else "last"
    with pytest.raises(CheckError, match="is not what base and delta give"):
        verify(made["base"], folders, out, on_conflict=other)


def test_conflicts_are_errors_unless_asked_for(made, tmp_path):
    with pytest.raises(DeltaError, match=r"law and .*sql conflict: both change .*--on-conflict"):
        merge(made["base"], [made["law"], made["sql"]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(DeltaError, match="--on-conflict first: choose one of error, last, mean"):
        merge(made["base"], made["law"], tmp_path / "merged", on_conflict="first")
    with pytest.raises(DeltaError, match="no delta"):
        merge(made["base"], [], tmp_path / "merged")


def test_experts_that_one_delta_touches_never_conflict(made, tmp_path):
    """They may be in one tensor of the base; and equal values are no conflict either."""
    names = ["sql", "code"]
    out = merge(made["base"], [made[n] for n in names], tmp_path / "merged")
    wanted = expected(made, names, tmp_path, "last")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(out).items())
    twice = merge(made["base"], [made["sql"], made["sql"]], tmp_path / "twice")
    alone = weights(tmp_path / "alone-sql")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in weights(twice).items())


def test_unmerging_gives_the_base_back(made, tmp_path):
    merged = merge(made["base"], made["law"], tmp_path / "merged")
    back = unmerge(merged, made["law"], tmp_path / "back", base=made["base"])
    for file in open_checkpoint(made["base"]).files:
        assert (back / file.name).read_bytes() == file.read_bytes()
        assert (merged / file.name).read_bytes() != file.read_bytes() or "-of-" in file.name
    assert (back / "config.json").read_bytes() == (made["base"] / "config.json").read_bytes()
    assert not (back / "README.md").exists()  # the merge's card


def test_a_compressed_delta_holds_what_unmerging_needs(made, tmp_path):
    merged = merge(made["base"], made["law"], tmp_path / "merged")
    export(made["law"], tmp_path / "law", base=made["base"], compress=True)
    back = unmerge(merged, tmp_path / "law", tmp_path / "back")
    for file in open_checkpoint(made["base"]).files:
        assert (back / file.name).read_bytes() == file.read_bytes()
    other = merge(made["base"], made["sql"], tmp_path / "other")
    with pytest.raises(CheckError, match="what was put back is not the base's"):
        unmerge(other, tmp_path / "law", tmp_path / "out")


def test_what_cannot_be_unmerged_is_refused_with_the_reason(made, tmp_path):
    base, law = made["base"], made["law"]
    merged = merge(base, law, tmp_path / "merged")
    out = tmp_path / "out"
    with pytest.raises(DeltaError, match=r"final values only.*give --base BASE"):
        unmerge(merged, law, out)
    both = merge(base, [law, made["code"]], tmp_path / "both")
    with pytest.raises(CheckError, match=r"another delta (may be merged|was too)"):
        unmerge(both, law, out, base=base)
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(CheckError, match=r"(what was put back is not the base's|is missing from)"):
        unmerge(merged, law, out, base=other)  # of another family, where the layout is gpt-oss's
    small = tmp_path / "small"
    small.mkdir()
    save_file({"x": torch.zeros(1)}, small / "model.safetensors")
    (small / "config.json").write_text("{}")
    with pytest.raises(CheckError, match="is missing from it"):
        unmerge(small, law, out, base=base)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(OutputError):
        unmerge(merged, law, out, base=base)

"""Every method through one contract, on families that keep their experts differently.

Prepare, train, save, load, merge. The oracle of what was trained is the trained model itself, made
an ordinary one by whoever attached something to it: esft's `detach`, PEFT's `merge_and_unload`.
Weights are compared bit by bit, in the base's dtype, and so are the logits of plain models; those
of a prepared model, whose kernels sum in another order, with those of one prepared alike.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from esft.delta import attach_delta
from esft.errors import CheckError, DeltaError, EsftError
from esft.experts import attach, detach
from esft.fingerprint import fingerprint
from esft.merging import verify
from esft.methods import ExpertMethod, FullMethod, HotLoraMethod, LoraMethod, Method
from esft.names import disk_tensors
from esft.recipe_sections import LoraSpec, TrainSpec
from esft.selection import Selection
from esft.shards import open_checkpoint, read_header
from esft.switching import load_delta
from tests.deltas import load, save_base
from tests.models import EXPERTS, HIDDEN, INNER
from tests.training_loop import batches, train_steps

# A tensor an expert; a tensor for all of them, transposed and with biases; neither the experts
# interface nor a third dimension.
FAMILIES = ("qwen3_moe", "gpt_oss", "dbrx")
PICKED = Selection(experts={0: [3], 1: [5, 0]})
RANK = 2


class Case(NamedTuple):
    """A method, and what is known of it.

    Attributes:
        make: makes it.
        ordinary: makes the trained model a plain one.
        again: prepares a model loaded from a merge, or from the base and the delta, for the same
            computation as the trained one's.
    """

    make: Callable[[], Method]
    ordinary: Callable[[Any], Any]
    again: Callable[[Any, Any, Path], Any]


def attached(merged: Any, _base: Any, _delta: Path) -> Any:
    return attach(merged, PICKED)


CASES = {
    "esft": Case(lambda: ExpertMethod(PICKED), detach, attached),
    "random": Case(lambda: ExpertMethod(PICKED, name="random"), detach, attached),
    "esft-non-expert": Case(
        lambda: ExpertMethod(PICKED, TrainSpec(non_expert_modules=True)),
        detach,
        lambda merged, _base, _delta: attach(merged, PICKED, non_expert_modules=True),
    ),
    "hot-lora": Case(lambda: HotLoraMethod(PICKED, LoraSpec(r=RANK)), detach, attached),
    "lora": Case(
        lambda: LoraMethod(LoraSpec(r=RANK)),
        lambda model: model.merge_and_unload(),
        lambda _merged, base, delta: PeftModel.from_pretrained(base, delta),
    ),
    "full": Case(FullMethod, lambda model: model, lambda merged, _base, _delta: merged),
}
# One control is as good as three: it differs from esft by the selection alone.
RUNS = [
    (family, case)
    for family, case in itertools.product(FAMILIES, CASES)
    if family == FAMILIES[0] or case not in ("random", "esft-non-expert")
]


class Trained(NamedTuple):
    """A method's run: the trained model, the same as a plain one, and what it left on disk."""

    case: Case
    method: Method
    base: Path
    delta: Path
    merged: Path
    prepared: Any
    ordinary: Any


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, name = request.param
    case, folder = CASES[name], tmp_path_factory.mktemp("run")
    base, delta = save_base(folder / "base", family), folder / "delta"
    prints = fingerprint(open_checkpoint(base))
    method = case.make()
    torch.manual_seed(0)
    prepared: Any = method.prepare(load(base))
    method.check(prepared, prints)
    train_steps(prepared, 3)
    delta.mkdir()
    method.save(prepared, delta, prints, {"method": method.name, "base": {"name": family}})
    merged = method.merge(base, delta, folder / "merged")
    ordinary = case.ordinary(copy.deepcopy(prepared.eval())).eval()
    return Trained(case, method, base, delta, merged, prepared, ordinary)


def logits(model: Any) -> Tensor:
    model = copy.deepcopy(model)
    for parameter in model.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model(input_ids=batches(1)[0], use_cache=False).logits  # type: ignore[no-any-return]


def on_disk(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in disk_tensors(model)}


def changed(one: Any, other: Any) -> set[str]:
    before, after = on_disk(one), on_disk(other)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_parameters_are_those_with_a_gradient(trained: Trained) -> None:
    model = copy.deepcopy(trained.prepared)
    model.zero_grad()
    # Long enough that every expert of the selection gets some token.
    ids = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = trained.method.parameters(model)
    assert found
    assert all(parameter.grad is not None for parameter in found.values())
    others = {name: p for name, p in model.named_parameters() if name not in found}
    assert not [name for name, parameter in others.items() if parameter.grad is not None]


def test_it_is_loaded_as_it_was_trained(trained: Trained) -> None:
    found = trained.method.load(load(trained.base), trained.base, trained.delta).eval()
    assert not changed(found, trained.ordinary)
    assert torch.equal(logits(found), logits(trained.ordinary))
    # By the public way in, too, which asks the manifest.
    again = attach_delta(load(trained.base), trained.base, trained.delta).eval()
    assert not changed(again, trained.ordinary)


def test_it_merges_to_a_plain_checkpoint(trained: Trained) -> None:
    merged = load(trained.merged)
    assert not changed(merged, trained.ordinary)
    assert torch.equal(logits(merged), logits(trained.ordinary))
    if trained.method.name != "lora":  # whose merge is of a loaded model, not of files
        count = len(open_checkpoint(trained.base).entries)
        assert verify(trained.base, trained.delta, trained.merged).merged == count


def test_what_computed_while_it_trained_is_what_is_saved(trained: Trained) -> None:
    again = trained.case.again(load(trained.merged), load(trained.base), trained.delta)
    assert torch.equal(logits(again), logits(trained.prepared))


def test_what_is_not_trained_keeps_its_bits(trained: Trained) -> None:
    before, after = on_disk(load(trained.base)), on_disk(load(trained.merged))
    moved = changed(load(trained.base), load(trained.merged))
    assert moved
    if trained.method.name == "full":
        return
    assert not [name for name in moved if name.endswith(("router.weight", "mlp.gate.weight"))]
    if trained.method.name == "lora" or trained.case is CASES["esft-non-expert"]:
        return
    for name in moved:
        layer, *expert = (int(part) for part in name.split(".") if part.isdigit())
        if not expert:  # all experts in one tensor
            rows = (before[name] != after[name]).unflatten(0, (EXPERTS, -1)).flatten(1).any(1)
            expert = rows.nonzero().flatten().tolist()
        assert "experts" in name
        assert set(expert) <= set(PICKED.experts.get(layer, [])), name


def test_experts_alone_can_be_switched(trained: Trained) -> None:
    model = load(trained.base)
    if model.config.model_type == "dbrx" or trained.case.again is not attached:
        with pytest.raises(EsftError):
            load_delta(model, trained.delta, base=trained.base)
        return
    load_delta(model, trained.delta, base=trained.base)
    for layer, experts in PICKED.experts.items():
        path = f"model.layers.{layer}.mlp.experts"
        loaded: Any = model.get_submodule(path).esft_deltas
        for name, stack in loaded.stacks.items():
            expected = trained.ordinary.get_submodule(path).get_parameter(name)
            assert torch.equal(stack, expected[sorted(experts)])


def test_another_methods_delta_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = ExpertMethod(PICKED) if trained.method.name != "esft" else FullMethod()
    reason = f"was trained by the method {trained.method.name}, not {other.name}"
    with pytest.raises(DeltaError, match=reason):
        other.load(load(trained.base), trained.base, trained.delta)
    with pytest.raises(DeltaError, match=reason):
        other.merge(trained.base, trained.delta, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", load(trained.base).config.model_type, seed=1)
    with pytest.raises(CheckError):
        trained.method.merge(other, trained.delta, tmp_path / "merged")
    with pytest.raises(CheckError):
        trained.method.load(load(other), other, trained.delta)
    assert not (tmp_path / "merged").exists()


def test_what_is_told_of_an_adapter(trained: Trained) -> None:
    told = trained.method.adapter
    if trained.method.name not in ("lora", "hot-lora"):
        assert told is None
        return
    assert told is not None
    files = [read_header(file).values() for file in trained.delta.glob("*.safetensors")]
    size = sum(entry.end - entry.start for entries in files for entry in entries)
    assert told == {"r": RANK, "alpha": 2 * RANK, "bytes": size}
    if trained.method.name == "hot-lora":
        fused = load(trained.base).config.model_type == "gpt_oss"
        # Gate and up are one matrix [H, 2I] there, and two [I, H] elsewhere.
        sides = (HIDDEN + 2 * INNER) + (INNER + HIDDEN) if fused else 3 * (HIDDEN + INNER)
        assert size == 4 * RANK * sides * sum(map(len, PICKED.experts.values()))

"""Which path computes a layer, and what is said where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from esft_kernels import ExpertBank, Projection, moe_mlp, naive, path
from expert_layers import error, exact, inputs, make_bank, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

KERNELS = Path(path.__file__).parents[1]


def layer(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ExpertBank]:
    return inputs(7, 2, dtype), make_bank([5, 0], dtype=dtype)


@pytest.mark.parametrize("asked", path.PATHS)
def test_the_variable_decides(asked, monkeypatch, programs):
    args, bank = layer()
    monkeypatch.setenv("ESFT_KERNELS", asked)
    assert path.choose(args[0], bank) == asked
    moe_mlp(*args, bank)
    assert (len(programs) > 0) == (asked == "triton")


@pytest.mark.parametrize("asked", [None, ""])
def test_a_cpu_gets_the_grouped_path(asked, monkeypatch, programs):
    monkeypatch.delenv("ESFT_KERNELS", raising=False)
    if asked is not None:
        monkeypatch.setenv("ESFT_KERNELS", asked)
    args, bank = layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path.choose(args[0], bank) == "grouped"
        moe_mlp(*args, bank)
    assert not programs


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", "Triton")
    args, bank = layer()
    expected = "ESFT_KERNELS=Triton: expected one of naive, grouped, triton"
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(*args, bank)


@pytest.mark.parametrize("interpret", [None, "0"])
def test_triton_on_a_cpu_needs_its_interpreter(interpret, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    args, bank = layer()
    expected = "ESFT_KERNELS=triton: x is on cpu; on a CPU the kernels need TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(*args, bank)


def test_triton_is_not_imported_before_it_is_needed():
    """It exists on Linux only."""
    code = (
        "import sys, torch; import esft_kernels as k\n"
        "bank = k.ExpertBank(k.Projection(torch.ones(1, 8, 4), torch.ones(2, 8, 4)),\n"
        "    k.Projection(torch.ones(1, 4, 4), torch.ones(2, 4, 4)), torch.arange(3), k.SwiGLU())\n"
        "k.moe_mlp(torch.ones(2, 4), torch.zeros(2, 1).long(), torch.ones(2, 1), bank)\n"
        "assert not any(name.endswith('.triton') for name in sys.modules if 'esft' in name)\n"
        "assert 'esft_kernels.tiled' not in sys.modules"
    )
    env = {key: value for key, value in os.environ.items() if key != "ESFT_KERNELS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env | {"PYTHONPATH": str(KERNELS)})


def test_triton_may_be_missing(monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", "triton")
    monkeypatch.setitem(sys.modules, "triton", None)  # as `import` finds what is not there
    args, bank = layer()
    with pytest.raises(ValueError, match="ESFT_KERNELS=triton: Triton is not installed"):
        moe_mlp(*args, bank)


def test_triton_does_not_compute_in_float64(monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", "triton")
    args, bank = layer(torch.float64)
    expected = (
        "ESFT_KERNELS=triton: torch.float64 is not among "
        "torch.bfloat16, torch.float16, torch.float32"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(*args, bank)


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("gaps", [False, True])
def test_triton_needs_both_banks_in_one_layout(name, gaps, monkeypatch):
    """Either they differ as they are, or once the trainable one is cast, which closes gaps."""
    monkeypatch.setenv("ESFT_KERNELS", "triton")
    args, bank = layer()
    projection = getattr(bank, name)
    if gaps:
        trainable, frozen = projection.trainable.detach(), projection.frozen
        wide = [w.repeat_interleave(2, dim=-1)[..., ::2] for w in (trainable, frozen)]
        # In one dtype the same gaps are no obstacle.
        same = replace(projection, trainable=wide[0], frozen=wide[1])
        moe_mlp(*args, replace(bank, **{name: same}))
        double = trainable.double().repeat_interleave(2, dim=-1)[..., ::2]
        assert double.stride()[1:] == wide[1].stride()[1:]
        projection = replace(same, trainable=double)
    else:
        frozen = projection.frozen.transpose(1, 2).contiguous().transpose(1, 2)
        projection = replace(projection, frozen=frozen)
    expected = f"the two banks of bank.{name} differ in memory layout"
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(*args, replace(bank, **{name: projection}))


@pytest.mark.parametrize("selected", [[], [0, 1, 2, 3, 4, 5]])
def test_the_layout_of_an_empty_bank_does_not_count(selected, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", "triton")
    args, bank = inputs(7, 2, torch.float32), make_bank(selected, dtype=torch.float32)
    expected, expected_grads = run(naive.moe_mlp, *exact(args, bank))
    empty = "frozen" if selected else "trainable"

    def turn(projection: Projection) -> Projection:
        shape = getattr(projection, empty).shape
        turned = torch.empty(0, shape[2], shape[1]).transpose(1, 2)
        return replace(projection, **{empty: turned.requires_grad_(empty == "trainable")})

    out, grads = run(moe_mlp, args, replace(bank, up=turn(bank.up), down=turn(bank.down)))
    assert error(out, expected) < 1e-5
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("key", ["trainable", "frozen"])
def test_triton_needs_experts_below_2_31_elements(name, key):
    args, bank = layer()
    projection = getattr(bank, name)
    weight = getattr(projection, key)
    # Nothing as large is allocated: a stride alone decides.
    far = torch.empty(1, device="meta").as_strided(weight.shape, (2**31, *weight.stride()[1:]))
    bank = replace(bank, **{name: replace(projection, **{key: far})})
    assert path.obstacle(args[0], bank) == f"an expert of bank.{name} has 2^31 elements or more"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tensors that say they are on a GPU. What the driver would say, a test has to say."""
    monkeypatch.delenv("ESFT_KERNELS", raising=False)
    path._warn.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch
    path._warn.cache_clear()


def capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


@pytest.mark.parametrize("version", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_a_gpu_gets_the_triton_path(gpu, version):
    capability(gpu, *version)
    _, bank = layer(torch.bfloat16)
    x = torch.empty(7, 16, device="cuda", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path.choose(x, bank) == "triton"


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ((7, 5), torch.float16, "compute capability 7.5 is below 8.0"),
        ((9, 0), torch.float64, "torch.float64 is not among"),
    ],
)
def test_a_gpu_that_is_not_served_is_told_why_once(gpu, version, dtype, reason):
    capability(gpu, *version)
    _, bank = layer(dtype)
    x = torch.empty(7, 16, device="cuda", dtype=dtype)
    with pytest.warns(UserWarning, match=f"grouped_mm, not through its Triton kernels: {reason}"):
        assert path.choose(x, bank) == "grouped"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path.choose(x, bank) == "grouped"
    gpu.setenv("ESFT_KERNELS", "triton")
    with pytest.raises(ValueError, match=f"ESFT_KERNELS=triton: {reason}"):
        path.choose(x, bank)


def test_an_amd_gpu_is_not_served(gpu):
    gpu.setattr(torch.version, "hip", "6.4")
    _, bank = layer(torch.bfloat16)
    x = torch.empty(7, 16, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="AMD GPUs are untested"):
        assert path.choose(x, bank) == "grouped"

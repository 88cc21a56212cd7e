"""The checked-in tables of tile sizes, and which entry a layer gets."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch
from esft_kernels import config

CONSTANTS = {
    "up_swiglu_fwd": {"BN", "BK"},
    "grouped_gemm": {"BN", "BK"},
    "gather_sum": {"BT", "BH"},
    "down_dact_bwd": {"BN", "BK", "SPLIT"},
    "wgrad_selected": {"BP", "BQ", "BR"},
}
OPTIONS = {"num_warps", "num_stages"}


def entries() -> list[tuple[str, dict[str, Any]]]:
    return [(arch, entry) for arch in config.ARCHITECTURES for entry in config.table(arch)]


def test_every_file_is_an_architecture_s():
    files = (resources.files("esft_kernels") / "configs").iterdir()
    assert {file.name for file in files} == {f"{arch}.json" for arch in config.ARCHITECTURES}


@pytest.mark.parametrize("arch", config.ARCHITECTURES)
def test_a_table_says_where_it_comes_from_and_serves_every_dtype(arch):
    path = resources.files("esft_kernels") / "configs" / f"{arch}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["source"]
    assert {entry["itemsize"] for entry in content["entries"]} == {2, 4}
    shapes = [[entry[k] for k in ("H", "I", "rows", "itemsize")] for entry in content["entries"]]
    assert len(shapes) == len({tuple(shape) for shape in shapes})


@pytest.mark.parametrize(("arch", "entry"), entries())
def test_an_entry_has_what_each_kernel_takes(arch, entry):
    assert set(CONSTANTS) == set(config.KERNELS)
    assert set(entry) == {"H", "I", "rows", "itemsize", "block_m", *CONSTANTS}
    # Triton multiplies blocks of 16 rows and columns or more.
    sizes = [entry["block_m"]]
    for kernel, constants in CONSTANTS.items():
        assert set(entry[kernel]) == constants | OPTIONS
        sizes += [entry[kernel][name] for name in constants - {"SPLIT", "BT"}]
    assert all(size >= 16 and size.bit_count() == 1 for size in sizes)
    assert entry["gather_sum"]["BT"].bit_count() == 1
    assert entry["down_dact_bwd"]["SPLIT"] in (1, 2)
    assert all(entry[kernel]["num_warps"] in (4, 8, 16) for kernel in CONSTANTS)
    assert all(1 <= entry[kernel]["num_stages"] <= 5 for kernel in CONSTANTS)


def test_the_interpreter_s_sizes_have_the_same_constants():
    cpu = config.layer_config(torch.device("cpu"), torch.float32, 2048, 768, 32)
    assert {kernel: set(sizes) for kernel, sizes in cpu.kernels.items()} == CONSTANTS


@pytest.mark.parametrize(("arch", "entry"), entries())
def test_a_shape_of_the_table_gets_its_own_entry(arch, entry):
    found = config.nearest(arch, entry["itemsize"], entry["H"], entry["I"], entry["rows"])
    assert found.block_m == entry["block_m"]
    assert found.kernels == {kernel: entry[kernel] for kernel in CONSTANTS}


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1024, 512, 64, 2), (4096, 512, 64, 2), (1024, 2048, 64, 2), (1024, 512, 512, 2)]
    table = [
        {"H": H, "I": inner, "rows": rows, "itemsize": size, "block_m": number}
        | {kernel: {"entry": number} for kernel in config.KERNELS}
        for number, (H, inner, rows, size) in enumerate([*shapes, (1024, 512, 64, 4)])
    ]
    monkeypatch.setattr(config, "table", lambda arch: table)
    config.nearest.cache_clear()
    yield
    config.nearest.cache_clear()


@pytest.mark.parametrize(
    ("itemsize", "hidden", "inner", "rows", "entry"),
    [
        (2, 1024, 512, 64, 0),
        (2, 1900, 512, 64, 0),  # by ratios: nearer to 1024 than to 4096 below 2048
        (2, 2200, 512, 64, 1),
        (2, 1024, 1100, 64, 2),
        (2, 1024, 512, 128, 0),
        (2, 1024, 512, 256, 3),
        (2, 1024, 512, 1, 0),
        (2, 8192, 600, 70, 1),
        (4, 4096, 2048, 512, 4),  # an element's size is never traded
    ],
)
def test_the_nearest_entry_is_found_by_ratios(small_table, itemsize, hidden, inner, rows, entry):
    found = config.nearest("sm_90", itemsize, hidden, inner, rows)
    assert found.block_m == entry
    assert found.kernels == {kernel: {"entry": entry} for kernel in config.KERNELS}


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_86"),
    ],
)
def test_architectures_go_by_shared_memory(capability, arch):
    assert config.architecture(capability) == arch


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0.2, 1), (1, 1), (40, 32), (50, 64), (500, 512), (700, 512), (730, 1024)]
)
def test_rows_per_expert_are_rounded_to_a_power_of_two(rows, bucket, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(config, "nearest", lambda *shape: asked.append(shape))
    config.layer_config(torch.device("cuda"), torch.bfloat16, 2048, 768, rows)
    assert asked == [("sm_90", 2, 2048, 768, bucket)]

"""Compile every kernel that a layer launches for a GPU that is not there, and look at the result.

    PYTHONPATH=kernels python kernels/bench/ahead_of_time.py sm_90

prints a JSON line that names the package's kernels, then one for each compiled. What is compiled is
what `moe_mlp` launches: a layer runs on meta tensors, its launches are caught with their arguments,
and each goes to Triton's compiler with the types and alignments that a launch would infer. Needs
no GPU, driver or CUDA toolkit, but a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import esft_kernels
import torch
import triton
from esft_kernels import ExpertBank, Projection, SwiGLU, config, tiled
from esft_kernels.quantised import KINDS, quantise
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a block may use."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
COMPUTE = {2: torch.bfloat16, 4: torch.float32}
EXPERTS, SELECTED, TOP_K = 64, 6, 8


@dataclass(frozen=True)
class Layout:
    """What decides which kernels a layer launches.

    Attributes:
        activation: of the experts.
        transposed: whether weights are stored `[in, out]`.
        bias: whether both projections have biases, which train too.
        kind: of the quantised frozen bank, if it is one.
    """

    activation: Callable[[Tensor], Tensor]
    transposed: bool = False
    bias: bool = False
    kind: str | None = None


LAYOUTS = {
    "plain": Layout(SwiGLU()),
    **{kind: Layout(SwiGLU(), kind=kind) for kind in KINDS},
    "interleaved": Layout(SwiGLU(interleaved=True)),
    "generic": Layout(lambda z: z[..., ::2].tanh() * z[..., 1::2], transposed=True, bias=True),
}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that its code depends on."""

    kernel: JITFunction = field(compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


def kernels() -> list[str]:
    """Return the names of the package's kernels: what is jitted and no other kernel calls."""
    found: dict[str, str] = {}
    for module in pkgutil.walk_packages(esft_kernels.__path__, "esft_kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction):
                found[value.fn.__name__] = value.src
    helpers = {
        name
        for name in found
        for caller, source in found.items()
        if caller != name and re.search(rf"\b{name}\(", source)
    }
    return sorted(found.keys() - helpers)


def launches(entry: dict[str, Any], layout: Layout) -> list[Launch]:
    """Return what a layer launches, forward and backward, with an entry of a table."""
    found: dict[Launch, None] = {}

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[_launch(self, args, kwargs)] = None

    chosen = config.Config(entry["block_m"], {name: entry[name] for name in config.KERNELS})
    run, JITFunction.run = JITFunction.run, catch
    look, tiled.layer_config = tiled.layer_config, lambda *_: chosen
    try:
        _layer(entry["H"], entry["I"], entry["rows"], COMPUTE[entry["itemsize"]], layout)
    finally:
        JITFunction.run, tiled.layer_config = run, look
    return list(found)


def _layer(hidden: int, inner: int, rows: int, dtype: torch.dtype, layout: Layout) -> None:
    """Run a layer forward and backward on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def projection(out: int, width: int) -> Projection:
        shape = (width, out) if layout.transposed else (out, width)
        biases = [empty(SELECTED, out), empty(EXPERTS - SELECTED, out)] if layout.bias else []
        frozen = empty(EXPERTS - SELECTED, *shape)
        return Projection(
            empty(SELECTED, *shape, dtype=torch.float32).requires_grad_(),
            quantise(frozen, layout.kind) if layout.kind else frozen,
            layout.transposed,
            *(bias.requires_grad_(i == 0) for i, bias in enumerate(biases)),
        )

    bank = ExpertBank(
        projection(2 * inner, hidden),
        projection(hidden, inner),
        empty(EXPERTS, dtype=torch.int64),
        layout.activation,
    )
    tokens = rows * EXPERTS // TOP_K
    x = empty(tokens, hidden).requires_grad_()
    weight = empty(tokens, TOP_K, dtype=torch.float32).requires_grad_()
    out = tiled.moe_mlp(x, empty(tokens, TOP_K, dtype=torch.int64), weight, bank)
    out.backward(torch.empty_like(out))


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    params = {param.name: param for param in kernel.params}
    given = dict(zip(params, args, strict=False))
    given |= {name: value for name, value in kwargs.items() if name in params}
    constants = {name: given[name] for name, param in params.items() if param.is_constexpr}
    types, aligned = {}, []
    for name, param in params.items():
        value = given[name]
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
            aligned.append(name)  # as every allocation of PyTorch's
        else:
            types[name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                aligned.append(name)
    options = {name: value for name, value in kwargs.items() if name not in params}
    return Launch(
        kernel,
        kernel.fn.__name__,
        tuple(types.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


def compiled(launch: Launch, arch: str) -> dict[str, Any]:
    """Compile a launch and count what matters in the machine code.

    Returns:
        product (whether there is a matrix product in it); registers; stack (bytes a thread);
        shared (bytes a block); and numbers of instructions: tensor_core (HMMA or HGMMA), wgmma
        (HGMMA), spill (LDL or STL), wide_copies (16 bytes from global to shared memory, past the
        registers: LDGSTS).
    """
    order = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(order.index(name),): value for name, value in launch.constants},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", "-ndf", file.name)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "product": "tt.dot" in kernel.asm["ttir"],
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "tensor_core": count(r"\bHG?MMA"),
        "wgmma": count(r"\bHGMMA"),
        "spill": count(r"\b(LDL|STL)"),
        "wide_copies": count(r"\bLDGSTS\S*\.128"),
    }


def fits(line: dict[str, Any]) -> bool:
    """Say whether a kernel neither spills nor needs more shared memory than there is."""
    return not line["stack"] and not line["spill"] and line["shared"] <= SHARED[line["arch"]]


def _output(tool: str, *args: str) -> str:
    ran = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


def jobs(entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield entries with layouts: each entry plain, the other layouts once, with large tiles."""
    largest = max(entries, key=lambda entry: (-entry["itemsize"], entry["block_m"]))
    for entry in entries:
        yield from ((entry, name) for name in (LAYOUTS if entry is largest else ["plain"]))


def main() -> None:
    """Compile for an architecture and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", choices=config.ARCHITECTURES)
    parser.add_argument("--entries", type=Path, help="another table like configs/*.json")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="of each entry")
    args = parser.parse_args()
    print(json.dumps({"triton": triton.__version__, "kernels": kernels()}), flush=True)
    entries = config.table(args.arch)
    if args.entries:
        entries = json.loads(args.entries.read_text(encoding="utf-8"))["entries"]
    work = itertools.product(entries, args.layouts) if args.layouts else jobs(entries)
    done: set[Launch] = set()
    for entry, layout in work:
        for launch in launches(entry, LAYOUTS[layout]):
            if launch in done:
                continue
            done.add(launch)
            line = {
                "arch": args.arch,
                "kernel": launch.name,
                "layout": layout,
                **{key: entry[key] for key in ("H", "I", "rows", "itemsize")},
                "constants": dict(launch.constants),
                "options": dict(launch.options),
            }
            line |= compiled(launch, args.arch)
            print(json.dumps(line | {"fits": fits(line)}), flush=True)


if __name__ == "__main__":
    main()

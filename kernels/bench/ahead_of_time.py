"""Compile every kernel that a layer launches for a GPU that is not there, and look at the result.

    python ahead_of_time.py sm_80 sm_90

prints a JSON line for each kernel. What is compiled is what `moe_mlp` launches: a layer runs on
meta tensors, its launches are caught with their arguments, and each goes to Triton's compiler with
the types and alignments that a launch would infer. Needs no GPU, driver or CUDA toolkit, but a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from esft_kernels import ExpertBank, Projection, SwiGLU, config, tiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
COMPUTE = {2: torch.bfloat16, 4: torch.float32}
EXPERTS, SELECTED, TOP_K = 64, 6, 8


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that its code depends on."""

    kernel: JITFunction = field(compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


def launches(arch: str, entry: dict[str, Any], plain: bool) -> list[Launch]:
    """Return what a layer launches, forward and backward, with an entry of the table.

    Args:
        arch: of the table.
        entry: one of its entries.
        plain: SwiGLU without biases; otherwise another activation, biases, transposed.
    """
    found: dict[Launch, None] = {}

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[_launch(self, args, kwargs)] = None

    run, JITFunction.run = JITFunction.run, catch
    look, tiled.layer_config = (
        tiled.layer_config,
        lambda *_: config.nearest(arch, entry["itemsize"], entry["H"], entry["I"], entry["rows"]),
    )
    try:
        _layer(entry["H"], entry["I"], entry["rows"], COMPUTE[entry["itemsize"]], plain)
    finally:
        JITFunction.run, tiled.layer_config = run, look
    return list(found)


def _layer(hidden: int, inner: int, rows: int, dtype: torch.dtype, plain: bool) -> None:
    """Run a layer forward and backward on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def projection(columns: int, width: int) -> Projection:
        shape = (columns, width) if plain else (width, columns)
        sizes = (SELECTED, EXPERTS - SELECTED)
        banks = [empty(n, *shape) for n in sizes]
        banks[0] = banks[0].float().requires_grad_()
        biases = [None, None] if plain else [empty(n, columns) for n in sizes]
        return Projection(banks[0], banks[1], not plain, *biases)

    bank = ExpertBank(
        projection(2 * inner, hidden),
        projection(hidden, inner),
        empty(EXPERTS, dtype=torch.int64),
        SwiGLU() if plain else lambda z: z[..., ::2].tanh() * z[..., 1::2],
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
        elif isinstance(value, torch.Tensor):
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
        registers; stack (bytes a thread); shared (bytes a block); tensor_core, wgmma and spill
        (instructions: HMMA or HGMMA, HGMMA, LDL or STL).
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
        code = _output("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "tensor_core": len(re.findall(r"\bHG?MMA", code)),
        "wgmma": len(re.findall(r"\bHGMMA", code)),
        "spill": len(re.findall(r"\b(LDL|STL)", code)),
    }


def _output(tool: str, *args: str) -> str:
    ran = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return ran.stdout + ran.stderr


def main() -> None:
    """Compile for the architectures that are named."""
    for arch in sys.argv[1:]:
        done: set[Launch] = set()
        for entry in config.table(arch):
            for plain in (True, False):
                for launch in launches(arch, entry, plain):
                    if launch in done:
                        continue
                    done.add(launch)
                    line = {
                        "arch": arch,
                        "kernel": launch.name,
                        "itemsize": entry["itemsize"],
                        "constants": dict(launch.constants),
                        "options": dict(launch.options),
                    }
                    print(json.dumps(line | compiled(launch, arch)), flush=True)


if __name__ == "__main__":
    main()

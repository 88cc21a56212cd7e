"""A layer of experts in which none trains: `moe_mlp` against transformers' `grouped_mm`.

    OMP_NUM_THREADS=1 PYTHONPATH=.:cli:kernels python kernels/bench/frozen_layer.py

Layers without a selected expert run on `moe_mlp` too once a selection is attached. Forward is
without gradients, as in scoring; forward and backward carries gradients to the layer's input and
to the gates, as in training an earlier layer.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from esft_cli.memory import keep_freed_memory
from esft_kernels import ExpertBank, Projection, moe_mlp
from esft_kernels.bank import slot_map
from setting import MODELS, cpus, in_turn, machine, ratio, setting, table
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward

from esft.moe import moe_layers

TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    keep_freed_memory()
    print(machine(), end="\n\n")
    rows = [row for name in args.models for row in measure(name, args.repeats)]
    header = ["layer of", "pass", "grouped_mm, CPU ms", "moe_mlp, CPU ms", "moe_mlp / grouped_mm"]
    print(table(header, rows))


def measure(name: str, repeats: int) -> list[list[str]]:
    """Return the table's rows of a model."""
    layer = moe_layers(setting(name).model().requires_grad_(False))[0]
    experts = layer.experts
    up, down = experts.gate_up_proj, experts.down_proj
    bank = ExpertBank(
        up=Projection(up[:0], up),
        down=Projection(down[:0], down),
        slot=slot_map([], layer.num_experts),
        activation=experts._apply_gate,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, up.shape[-1], generator=generator).requires_grad_()
    scores = torch.randn(TOKENS, layer.num_experts, generator=generator).softmax(-1)
    weight, index = scores.topk(layer.top_k)
    weight.requires_grad_()

    def stock() -> Tensor:
        return grouped_mm_experts_forward(experts, x, index, weight)

    def ours() -> Tensor:
        return moe_mlp(x, index, weight, bank)

    assert torch.allclose(stock(), ours(), rtol=1e-4, atol=1e-5)
    works = {
        "forward": {"stock": torch.no_grad()(stock), "ours": torch.no_grad()(ours)},
        "forward and backward": {
            "stock": lambda: torch.autograd.grad(stock().sum(), [x, weight]),
            "ours": lambda: torch.autograd.grad(ours().sum(), [x, weight]),
        },
    }
    rows = []
    for label, pair in works.items():
        times = {key: cpus(found) for key, found in in_turn(pair, repeats).items()}
        middle = {key: f"{1000 * statistics.median(found):.1f}" for key, found in times.items()}
        compared = ratio(times["ours"], times["stock"])
        rows.append([name, label, middle["stock"], middle["ours"], compared])
    return rows


if __name__ == "__main__":
    main()

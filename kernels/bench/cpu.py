"""One layer of experts on a CPU: `moe_mlp` against transformers' and PEFT's ways to train it.

    OMP_NUM_THREADS=1 PYTHONPATH=.:cli:kernels python kernels/bench/cpu.py

Every step is a forward and a backward of the experts alone, with gradients for the layer's input
and the gates. The opponents are transformers' experts modules, all given the same weights and
inputs; before anything is timed, their results are checked against each other.

Selected experts get their share of the routed rows by construction: the router's scores are noise,
plus one number for the selected experts that is searched until the share is met. As in a real
selection they are hot: each gets 1.6 times an average expert's rows, except at 100 %.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from esft_cli.memory import keep_freed_memory
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp
from esft_kernels.bank import frozen_ids, slot_map
from esft_kernels.grouped_mm import grouped_outer
from esft_kernels.quantised import quantise
from peft import LoraConfig, get_peft_model
from setting import cpus, in_turn, machine, ratio, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from esft.loading import DTYPES

TOKENS = 2048
SHARES = (0.05, 0.10, 0.25, 1.0)
HOT = 1.6
WARM_UP = 3  # steps until freed memory serves all later ones
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: E experts, K of them a token, hidden H, inner I."""

    E: int
    K: int
    H: int
    I: int  # noqa: E741


SHAPES = {"512x512": Shape(64, 8, 512, 512), "tiny-moe": Shape(64, 6, 160, 32)}


class Case:
    """A layer's weights, its input, a routing and a selection.

    Attributes:
        selected: ids of the n experts that train.
        share: of the routed rows, how much the selected experts got.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, share: float) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        config = AutoConfig.for_model(
            "qwen3_moe",
            num_experts=shape.E,
            hidden_size=shape.H,
            moe_intermediate_size=shape.I,
            experts_implementation="grouped_mm",
        )
        self.experts = Qwen3MoeExperts(config).to(dtype)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        n = shape.E if share == 1 else round(share * shape.E / HOT)
        self.selected = torch.randperm(shape.E)[:n].tolist()
        scores = _scores(shape, self.selected, share)
        weight, self.index = scores.softmax(-1).topk(shape.K)
        self.share = _share(self.index, self.selected)
        self.weight = weight.to(dtype).requires_grad_()
        self.x = torch.randn(TOKENS, shape.H, dtype=dtype).requires_grad_()
        self.d_out = torch.randn(TOKENS, shape.H, dtype=dtype)

    def opponent(self, implementation: str, *, trains: bool) -> Step:
        """Return transformers' layer, with all experts training or none."""
        experts = copy.deepcopy(self.experts).requires_grad_(trains)
        experts.config._experts_implementation = implementation
        return Step(self, experts, list(experts.parameters()))

    def lora(self) -> Step:
        """Return PEFT's LoRA, r = 8, on both stacks of experts, over `grouped_mm`."""
        holder = nn.ModuleDict({"experts": copy.deepcopy(self.experts)})
        names = [f"experts.{name}" for name, _ in self.experts.named_parameters()]
        model = get_peft_model(holder, LoraConfig(r=8, target_modules=[], target_parameters=names))
        return Step(self, model.base_model.model["experts"], list(model.parameters()))

    def ours(self, kind: str | None = None) -> Step:
        """Return `moe_mlp`; the trainable bank is in fp32, as `esft` has it.

        Args:
            kind: of a quantised frozen bank.
        """
        rest = frozen_ids(self.selected, self.shape.E)

        def projection(weight: Tensor) -> Projection:
            frozen = weight.detach()[rest]
            return Projection(
                weight.detach()[self.selected].float().requires_grad_(),
                quantise(frozen, kind) if kind else frozen,
            )

        ups, downs = projection(self.experts.gate_up_proj), projection(self.experts.down_proj)
        bank = ExpertBank(ups, downs, slot_map(self.selected, self.shape.E), SwiGLU())

        def layer(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            return moe_mlp(x, index, weight, bank)

        banks = [ups.trainable, ups.frozen, downs.trainable, downs.frozen]
        return Step(self, layer, [bank for bank in banks if isinstance(bank, Tensor)])


def _scores(shape: Shape, selected: list[int], share: float) -> Tensor:
    """Draw scores for which the selected experts get this share of the rows: `[T, E]`."""
    noise = torch.randn(TOKENS, shape.E)
    if len(selected) == shape.E:
        return noise
    low, high = -8.0, 8.0
    for _ in range(30):
        scores = noise.clone()
        scores[:, selected] += (low + high) / 2
        if _share(scores.topk(shape.K).indices, selected) < share:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return scores


def _share(index: Tensor, selected: list[int]) -> float:
    return float(torch.isin(index, torch.tensor(selected)).float().mean())


class Step:
    """A forward and backward pass of one layer.

    Attributes:
        parameters: of the layer, those that train and those that do not.
        out: what the last forward gave.
    """

    def __init__(
        self,
        case: Case,
        layer: Callable[[Tensor, Tensor, Tensor], Tensor],
        parameters: list[Tensor],
    ) -> None:
        self._case, self._layer, self.parameters = case, layer, parameters

    def __call__(self) -> None:
        self.clear()
        self.out = self.forward()
        self.out.backward(self._case.d_out)

    def clear(self) -> None:
        """Drop all gradients, as an optimizer does after its step."""
        for tensor in (self._case.x, self._case.weight, *self.parameters):
            tensor.grad = None

    def forward(self) -> Tensor:
        return self._layer(self._case.x, self._case.index, self._case.weight)

    def gradients(self) -> list[Tensor]:
        """Return the weights' gradients of the last call."""
        return [p.grad for p in self.parameters if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--dtype", choices=BOUNDS, nargs="+", default=list(BOUNDS))
    parser.add_argument("--share", type=float, nargs="+", default=SHARES)
    args = parser.parse_args()
    keep_freed_memory()
    print(machine(), end="\n\n")
    times, memory = [], []
    for name, dtype, share in itertools.product(args.shape, args.dtype, args.share):
        case = Case(SHAPES[name], DTYPES[dtype], share)
        label = [name, dtype, f"{100 * case.share:.1f} %", str(len(case.selected))]
        steps = {
            "ours": case.ours(),
            "eager": case.opponent("eager", trains=True),
            "full": case.opponent("grouped_mm", trains=True),
            "frozen": case.opponent("grouped_mm", trains=False),
            "lora": case.lora(),
        }
        check(case, steps, BOUNDS[dtype])
        times.append(label + timing(case, steps, args.repeats))
        memory.append(label + held(case, steps))
    first = ["layer", "dtype", "share of rows", "n of 64"]
    against = [f"/ {name}" for name in ("full", "frozen", "lora", "eager")]
    print(table([*first, "ours, CPU ms", *against, "dW / (share x all dW)"], times), end="\n\n")
    kinds = ("gradients", "saved", "peak")
    print(
        table(
            [*first, *(f"{kind}: {who}" for kind in kinds for who in ("ours", "full", "lora"))],
            memory,
        )
    )


def check(case: Case, steps: dict[str, Step], bound: float) -> None:
    """Compare what all compute: outputs, gradients of x and the gates, of weights that train."""
    found = {}
    for name, step in steps.items():
        step()
        flowing = [t.grad for t in (case.x, case.weight) if t.grad is not None]
        found[name] = [step.out.detach(), *flowing]
        if name == "ours":
            found[name] += step.gradients()
        elif name in ("full", "eager"):
            found[name] += [grad[case.selected] for grad in step.gradients()]
    for name, results in found.items():
        for result, expected in zip(results, found["full"], strict=False):
            error = float((result.float() - expected.float()).norm() / expected.float().norm())
            assert error < bound, f"{name}: {error:.1e}"


def timing(case: Case, steps: dict[str, Step], repeats: int) -> list[str]:
    """Return the cells of the first table."""
    fast = {name: step for name, step in steps.items() if name != "eager"}
    times = {name: cpus(found) for name, found in in_turn(fast, repeats, WARM_UP).items()}
    pair = {name: steps[name] for name in ("ours", "eager")}
    slow = {name: cpus(found) for name, found in in_turn(pair, min(3, repeats)).items()}
    products = {
        name: cpus(found) for name, found in in_turn(outer(case), 5 * repeats, WARM_UP).items()
    }
    scaled = [case.share * seconds for seconds in products["all"]]
    return [
        f"{1000 * statistics.median(times['ours']):.1f}",
        *(ratio(times["ours"], times[name]) for name in ("full", "frozen", "lora")),
        ratio(slow["ours"], slow["eager"]),
        ratio(products["selected"], scaled),
    ]


def outer(case: Case) -> dict[str, Callable[[], object]]:
    """Return the products that make both weights' gradients, of the selected experts and of all."""
    shape, N = case.shape, case.index.numel()
    counts = slot_map(case.selected, shape.E)[case.index].flatten().bincount(minlength=shape.E)
    offsets = counts.cumsum(0, dtype=torch.int32)
    rows, dz, dy, a = (
        torch.randn(N, width, dtype=case.dtype)
        for width in (shape.H, 2 * shape.I, shape.H, shape.I)
    )

    def products(experts: int) -> Callable[[], object]:
        end, pairs = int(offsets[experts - 1]), ((dz, rows), (dy, a))
        return lambda: [
            grouped_outer(left[:end], right[:end], offsets[:experts]) for left, right in pairs
        ]

    return {"selected": products(len(case.selected)), "all": products(shape.E)}


def held(case: Case, steps: dict[str, Step]) -> list[str]:
    """Return the cells of the second table: bytes of gradients, kept for the backward, at peak."""
    shown = {name: steps[name] for name in ("ours", "full", "lora")}
    gradients, saved, peak = {}, {}, {}
    for name, step in shown.items():
        step()
        gradients[name] = sum(grad.nbytes for grad in step.gradients())
        saved[name], peak[name] = saved_bytes(step), peak_bytes(step)
    bank = 4 * len(case.selected) * 3 * case.shape.H * case.shape.I  # bytes; fp32
    assert gradients["ours"] == bank, f"{gradients['ours']} bytes of gradients, expected {bank}"
    return [f"{found[name] / 1e6:.1f} MB" for found in (gradients, saved, peak) for name in shown]


def saved_bytes(step: Step) -> int:
    """Return what a forward keeps for its backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in step.parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.forward()
    return sum(kept.values())


def peak_bytes(step: Step) -> int:
    """Return by how much a step raises PyTorch's allocations at most."""
    step.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes))


if __name__ == "__main__":
    main()

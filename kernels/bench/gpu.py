"""One layer of experts on a GPU: ours against `grouped_mm`, and each kernel against its floor.

    PYTHONPATH=kernels python kernels/bench/gpu.py --out gpu.csv

In one run: what the card reaches (a large matrix product, a large copy), whether the results are
right, then times, as medians in ms. A row is written as soon as it is measured. No case starts
when the minutes are nearly over; those left out are listed at the end, in the file too. See
README.md for what the columns mean.

    TRITON_INTERPRET=1 PYTHONPATH=kernels python kernels/bench/gpu.py --smoke --out smoke.csv

runs the same on a CPU with tiny shapes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import grouped as grouped_layer
from baselines import prefix, stock, stock_forward
from esft_kernels import ExpertBank, tiled
from esft_kernels import grouped as esft_grouped
from floor import Ceilings, Load, Work, phases, works
from gpu_checks import checks
from gpu_kernels import kernel_runs, table_tiles
from gpu_rows import Rows
from gpu_setting import (
    FULL,
    SMOKE,
    Inputs,
    Lap,
    Scale,
    card,
    inputs,
    make_bank,
    measure,
    middle,
    pick_device,
    popularity,
    select,
    trainables,
    weights,
)
from torch import Tensor

ROUTINGS = ("uniform", "skewed")
SHARES = (0.10, 0.05, 0.25)
RESERVE = 20  # seconds: more than any one case takes


@dataclass(frozen=True)
class Case:
    """What is timed together; a share of 0 stands for the layers that do not depend on one."""

    model: str
    tokens: str
    routing: str
    share: float


def cases(scale: Scale) -> list[Case]:
    """Return all cases, those that answer most first."""
    return [
        Case(model, tokens, routing, share)
        for tokens, model, routing in itertools.product(scale.tokens, scale.shapes, ROUTINGS)
        for share in (0.0, *SHARES)
    ]


def ceilings(device: torch.device, scale: Scale, rows: Rows) -> Ceilings:
    """Measure what the device reaches: a matrix product in bf16, and a copy in memory."""
    side, size = (8192, 2**30) if device.type == "cuda" else (64, 2**16)
    pairs = [
        [torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(scale.sets)
    ]
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def multiply(i: int, lap: Lap) -> None:
        torch.mm(*pairs[i % scale.sets])
        lap()

    def copy(i: int, lap: Lap) -> None:
        target.copy_(source)
        lap()

    work = {"matrix product": Work(2 * side**3, 6 * side**2), "copy": Work(0, 2 * size)}
    ms = {}
    for name, run in {"matrix product": multiply, "copy": copy}.items():
        (times,) = measure(run, device, scale)
        ms[name] = middle(times)
        rows.timed("ceiling", times, ms[name], work[name], name=name)
    return Ceilings(
        1e3 * work["matrix product"].flops / ms["matrix product"],
        1e3 * work["copy"].bytes / ms["copy"],
    )


Layer = tuple[Callable[[Inputs], Tensor], list[Tensor]]
"""A layer, and the weights whose gradients are wanted."""


class Bench:
    """Times the cases of one model, number of tokens and routing."""

    def __init__(
        self, case: Case, device: torch.device, scale: Scale, ceilings: Ceilings, rows: Rows
    ) -> None:
        self._device, self._scale, self._ceilings, self._rows = device, scale, ceilings, rows
        self._shape, tokens = scale.shapes[case.model], scale.tokens[case.tokens]
        chosen = popularity(case.routing, self._shape.experts)
        self._batches = [inputs(self._shape, tokens, chosen, device) for _ in range(scale.sets)]
        self._up, self._down = weights(self._shape, device)

    def run(self, case: Case) -> None:
        """Write the rows of a case."""
        if case.share:
            index = self._batches[0].index
            selected = select(index, self._shape.experts, case.share)
            bank = make_bank(self._up, self._down, selected)
            self._layers(case, selected, self._sparse(bank), grad_bytes=4)
            self._kernels(case, selected, bank)
        else:
            everything = list(range(self._shape.experts))
            self._layers(case, everything, self._dense("full"), grad_bytes=2)
            self._layers(case, [], self._dense("frozen"), grad_bytes=2)

    def _dense(self, what: str) -> dict[str, Layer]:
        """Return the layers that train all experts, or with `frozen` none."""
        trains = what == "full"
        up, down = (w.detach().requires_grad_(trains) for w in (self._up, self._down))
        module = stock(up, down).requires_grad_(trains)
        return {
            f"grouped_mm {what}": (
                lambda b: grouped_layer(b.x, b.index, b.gates, up, down),
                [up, down] if trains else [],
            ),
            f"transformers {what}": (
                lambda b: stock_forward(module, b.x, b.index, b.gates),
                list(module.parameters()) if trains else [],
            ),
        }

    def _sparse(self, bank: ExpertBank) -> dict[str, Layer]:
        """Return the layers that train the selected experts only."""
        layer, own = prefix(self._up, self._down, bank.slot, bank.num_selected)
        ours = trainables(bank)
        return {
            "esft triton": (lambda b: tiled.moe_mlp(b.x, b.index, b.gates, bank), ours),
            "esft grouped": (lambda b: esft_grouped.moe_mlp(b.x, b.index, b.gates, bank), ours),
            "grouped_mm prefix dW": (lambda b: layer(b.x, b.index, b.gates), list(own)),
        }

    def _layers(
        self,
        case: Case,
        selected: list[int],
        layers: dict[str, Layer],
        grad_bytes: int,
    ) -> None:
        """Time forward and backward of layers, whose gradients are x's, the gates' and more."""
        load = self._load(selected, grad_bytes)
        floors = phases(load, self._ceilings)
        for name, (layer, trained) in layers.items():

            def step(i: int, lap: Lap, layer=layer, trained=trained) -> None:
                batch = self._batches[i % len(self._batches)]
                out = layer(batch)
                lap()
                torch.autograd.grad(out, [batch.x, batch.gates, *trained], batch.d_out)
                lap()

            forward, backward = measure(step, self._device, self._scale)
            both = [sum(pair) for pair in zip(forward, backward, strict=True)]
            times = {"forward": forward, "backward": backward, "step": both}
            for phase, floor in floors.items():
                row = self._columns(case, load) | {"name": name, "phase": phase}
                self._rows.timed("layer", times[phase], floor, **row)

    def _kernels(self, case: Case, selected: list[int], bank: ExpertBank) -> None:
        """Time each kernel of ours on its own."""
        load = self._load(selected, grad_bytes=4)
        work = works(load)
        tiles = table_tiles(self._batches[0], bank)
        for name, run in kernel_runs(self._batches, bank, tiles).items():

            def once(i: int, lap: Lap, run=run) -> None:
                run(i % len(self._batches))
                lap()

            (times,) = measure(once, self._device, self._scale)
            floor = self._ceilings.milliseconds(work[name])
            row = self._columns(case, load) | {"name": name}
            self._rows.timed("kernel", times, floor, work[name], **row)

    def _load(self, selected: list[int], grad_bytes: int) -> Load:
        """Return the mean load of the batches."""
        counts = torch.stack(
            [torch.bincount(b.index.view(-1), minlength=self._shape.experts) for b in self._batches]
        )
        tokens, top_k = self._batches[0].index.shape
        return Load(
            self._shape.hidden,
            self._shape.inner,
            tokens,
            tokens * top_k,
            used=round(float((counts > 0).sum(1).float().mean())),
            selected=len(selected),
            selected_rows=round(float(counts[:, selected].sum(1).float().mean())),
            grad_bytes=grad_bytes,
        )

    def _columns(self, case: Case, load: Load) -> dict[str, Any]:
        row_share = load.selected_rows / load.rows
        return asdict(case) | {"selected": load.selected, "row_share": row_share}


def groups(scale: Scale) -> Iterator[tuple[Case, list[Case]]]:
    """Yield cases that share their tensors."""
    for _, group in itertools.groupby(cases(scale), lambda c: (c.model, c.tokens, c.routing)):
        members = list(group)
        yield members[0], members


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    args = parser.parse_args()
    device, scale = pick_device(args.smoke), SMOKE if args.smoke else FULL
    end = time.monotonic() + 60 * args.minutes
    torch.manual_seed(0)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        rows = Rows(file)
        rows.add("machine", note=f"{time.strftime('%Y-%m-%d', time.gmtime())}; {card(device)}")
        reached = ceilings(device, scale, rows)
        wrong = 0
        for check in checks(device, scale):
            rows.add(
                "check",
                name=check.case,
                phase=check.result,
                error="" if check.error is None else check.error,
                bound=check.bound,
                note="WRONG" if check.failed else check.note,
            )
            wrong += check.failed
        if wrong:
            raise SystemExit(f"{wrong} results are wrong; nothing was timed")
        left_out = 0
        for first, members in groups(scale):
            bench = None
            for case in members:
                if time.monotonic() + RESERVE > end:
                    rows.add("left out", **asdict(case), note=f"{args.minutes:g} minutes are over")
                    left_out += 1
                    continue
                bench = bench or Bench(first, device, scale, reached, rows)
                bench.run(case)
        print(f"{left_out} cases left out" if left_out else "no case left out")
        print(rows.summary())


if __name__ == "__main__":
    main()

"""Tensors without content: what they would take, against real ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esft.plans.pretence import pretending


def test_storages_are_counted_once_and_forgotten() -> None:
    with pretending() as tracker:
        first = torch.empty(100, 10)
        assert tracker.live == 4000
        view = first.view(10, 100)[2:]
        second = first.to(torch.bfloat16)
        assert tracker.live == 4000 + 2000
        del first
        assert tracker.live == 4000 + 2000  # the view holds on
        del view
        assert tracker.live == 2000
        assert tracker.peak == 6000
        tracker.reset()
        assert tracker.peak == 2000
        del second
        assert tracker.live == 0


def test_nothing_is_allocated_and_nothing_stays_changed() -> None:
    usual = nn.Module._apply
    with pretending() as tracker:
        torch.empty(10**15)  # 4 PB
        assert tracker.peak == 4 * 10**15
    assert nn.Module._apply is usual
    assert float(torch.ones(2).sum()) == 2


def test_the_peak_of_a_forward_and_backward_pass_by_hand() -> None:
    B, H = 16, 32
    with pretending() as tracker:
        weight = nn.Parameter(torch.empty(H, H))
        x = torch.empty(B, H)
        tracker.reset()
        fixed = tracker.live
        loss = (x @ weight).relu().sum()
        # The product and its relu at a time; the product has gone when these are summed.
        assert tracker.peak - fixed == 2 * 4 * B * H
        loss.backward()
        assert weight.grad is not None
        assert tracker.live >= fixed + weight.nbytes


def test_operations_are_those_that_torch_counts() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 8, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    with pretending() as tracker:
        pretended = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        tracker.reset()
        pretended(torch.empty(2, 8, 32)).sum().backward()
    attention = 2 * 2 * 2 * 8 * 8 * 32  # torch's counter leaves out the CPU's own kernel
    assert tracker.flops in (
        counter.get_total_flops(),
        counter.get_total_flops() + attention + attention * 5 // 2,
    )


def test_grouped_products() -> None:
    E, M, k, n = 4, 24, 16, 8
    with pretending() as tracker:
        x, weight = torch.empty(M, k), torch.empty(E, k, n)
        ends = torch.empty(E, dtype=torch.int32)
        tracker.reset()
        y = torch.nn.functional.grouped_mm(x, weight, offs=ends)
        assert y.shape == (M, n)
        assert tracker.flops == 2 * M * k * n
        outer = torch.nn.functional.grouped_mm(x.t(), y, offs=ends)
        assert outer.shape == (E, k, n)
        assert tracker.flops == 4 * M * k * n

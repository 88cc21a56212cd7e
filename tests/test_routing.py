"""Sums of what routers decide, against the ids and weights that the experts were called with.

tests/test_profiling.py scores four families from the routers' own weights; here are other routers,
whose decisions are taken as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esft.moe import moe_layers
from esft.routing import NOT_COUNTED, RoutingSums
from tests.families import small
from tests.models import EXPERTS, TOP_K

TOKENS = 40
# Families that divide a token's weights by their sum, before a constant factor if they have one.
NORMALISED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"norm_topk_prob": True},
    "glm4_moe": {"norm_topk_prob": True},
    "gpt_oss": {},
    "granitemoe": {},
    "nemotron_h": {"norm_topk_prob": True},
    "solar_open": {"norm_topk_prob": True},
}


@pytest.mark.parametrize("family", NORMALISED)
def test_counts_and_gates_are_those_of_a_plain_loop(family: str) -> None:
    model = small(family, **NORMALISED[family]).float()
    layers = moe_layers(model)
    seen: dict[int, tuple[list[list[int]], list[list[float]]]] = {}
    for layer in layers:
        layer.experts.register_forward_pre_hook(
            lambda _module, args, index=layer.index: seen.__setitem__(
                index, (args[1].tolist(), args[2].double().tolist())
            )
        )
    sums = RoutingSums(layers)
    # A third of the tokens in each half, and a third in none.
    sums.half_T = torch.arange(TOKENS) % 3
    assert int(sums.half_T.max()) == NOT_COUNTED
    with sums.hooked(), torch.no_grad():
        model(torch.arange(3, 3 + TOKENS)[None], use_cache=False)
    for halves in ([0], [1], [0, 1]):
        tokens = [token for token in range(TOKENS) if token % 3 in halves]
        found = sums.scores(halves, len(tokens))
        assert list(found) == [layer.index for layer in layers]
        for layer in layers:
            counts, gates = [0] * EXPERTS, [0.0] * EXPERTS
            ids, weights = seen[layer.index]
            for token in tokens:
                for expert, weight in zip(ids[token], weights[token], strict=True):
                    counts[expert] += 1
                    gates[expert] += weight / layer.gate_scale
                # `gate_scale` is the factor that the router multiplied in.
                assert sum(weights[token]) / layer.gate_scale == pytest.approx(1, abs=1e-5)
            scores = found[layer.index]
            assert scores.token == pytest.approx([n / TOP_K / len(tokens) for n in counts])
            assert scores.gate == pytest.approx([g / len(tokens) for g in gates], abs=1e-12)

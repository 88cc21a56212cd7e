"""How far a token's id fixes its experts, and which experts meet: against plain loops."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from esft.data.example import Example
from esft.diagnostics import FixedByToken
from esft.moe import moe_layers
from esft.profiling import profile_model
from tests.families import small
from tests.models import EXPERTS, FAMILIES, TOP_K, tiny

SEEN_AT_LEAST = 8


def rows(number: int = 40, vocabulary: int = 12, seed: int = 0) -> list[Example]:
    """Rows of few different ids, so that some are seen often and others are not."""
    rng = random.Random(seed)
    return [
        Example(
            [3 + int(vocabulary * rng.random() ** 2) for _ in range(length)],
            [place % 3 > 0 for place in range(length)],
            f"rows:{row}",
        )
        for row, length in enumerate(rng.choices(range(1, 20), k=number), start=1)
    ]


Choices = dict[int, list[tuple[int, int, list[int]]]]  # layer: (row, token id, its K experts)


def choices(model: Any, examples: list[Example], count: str) -> Choices:
    """Run rows one by one and note what each counted token chose."""
    seen: dict[int, list[list[int]]] = {}
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(
            lambda _module, args, index=layer.index: seen.__setitem__(
                index, args[1].reshape(-1, TOP_K).tolist()
            )
        )
    found: Choices = defaultdict(list)
    for number, example in enumerate(examples):
        with torch.no_grad():
            model(torch.tensor([example.input_ids]), use_cache=False)
        for index, experts in seen.items():
            for token, answer, chosen in zip(
                example.input_ids, example.completion, experts, strict=True
            ):
                if count == "all" or answer == (count == "completion"):
                    found[index].append((number, token, chosen))
    return found


def plain_fixed(noted: list[tuple[int, int, list[int]]], most: int = 100) -> FixedByToken | None:
    """The definition of `TokenRouting.fixed`, with dictionaries; of the `most` frequent ids."""
    tokens = Counter((row % 2, token) for row, token, _ in noted)
    often = {t for _, t in tokens if min(tokens[0, t], tokens[1, t]) >= SEEN_AT_LEAST}
    often = set(sorted(often, key=lambda t: (-tokens[0, t] - tokens[1, t], t))[:most])
    if not often:
        return None
    shares = []
    for name in (lambda token: token, lambda _token: 0):
        table: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for row, token, chosen in noted:
            if token in often:
                table[row % 2, name(token)].update(chosen)
        hit = total = 0
        for (half, key), chosen_here in table.items():
            other = table[1 - half, key]
            majority = sorted(range(EXPERTS), key=lambda e, other=other: (-other[e], e))[:TOP_K]
            hit += sum(chosen_here[expert] for expert in majority)
            total += sum(chosen_here.values())
        shares.append(hit / total)
    number = sum(tokens[half, token] for half in (0, 1) for token in often)
    return FixedByToken(shares[0], shares[1], len(often), number)


@pytest.mark.parametrize("count", ["all", "completion"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_by_token_is_the_plain_loop(family: str, count: str) -> None:
    examples = rows()
    found = profile_model(tiny(family), examples, count=count, batch_tokens=50)
    expected = {
        index: plain_fixed(noted) for index, noted in choices(tiny(family), examples, count).items()
    }
    assert {index: layer.routing.fixed_by_token for index, layer in found.layers.items()} == (
        expected
    )
    some = next(iter(expected.values()))
    assert some is not None
    assert 2 < some.token_ids < 12  # not all twelve ids are frequent
    assert some.share > some.without_id


def test_of_many_ids_the_most_frequent_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esft.token_routing.MOST_IDS", 3)
    found = profile_model(tiny("qwen3_moe"), rows())
    for index, noted in choices(tiny("qwen3_moe"), rows(), "all").items():
        routing = found.layers[index].routing
        assert routing is not None
        assert routing.fixed_by_token == plain_fixed(noted, most=3)
        assert routing.fixed_by_token.token_ids == 3


def test_rare_ids_give_no_figure() -> None:
    examples = [Example([3, 4, 5, 6], [True] * 4, "rows:1")] * (2 * SEEN_AT_LEAST - 1)
    layer = profile_model(tiny("mixtral"), examples).layers[0]
    assert layer.routing is not None
    assert layer.routing.fixed_by_token is None
    layer = profile_model(tiny("mixtral"), [*examples, examples[0]]).layers[0]
    assert layer.routing is not None
    assert layer.routing.fixed_by_token is not None
    # The same text in every row: its ids can only be routed one way.
    assert layer.routing.fixed_by_token.share == 1
    assert layer.routing.fixed_by_token.tokens == 4 * 2 * SEEN_AT_LEAST


@pytest.mark.parametrize("count", ["all", "prompt"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "longcat_flash"])
def test_cooccurrence_is_the_plain_loop(family: str, count: str) -> None:
    # LongCat's routers may choose ids beyond the experts', which are none.
    model = tiny(family) if family == "longcat_flash" else small(family).float()
    examples = rows()
    found = profile_model(model, examples, count=count, batch_tokens=60, cooccurrence=True)
    for index, noted in choices(model, examples, count).items():
        expected = [[0] * EXPERTS for _ in range(EXPERTS)]
        for _, _, chosen in noted:
            real = [expert for expert in chosen if expert < EXPERTS]
            for a in real:
                for b in real:
                    expected[a][b] += 1
        assert found.layers[index].cooccurrence == expected
        assert found.layers[index].counts() == [expected[e][e] for e in range(EXPERTS)]


def test_cooccurrence_is_counted_on_demand_only() -> None:
    assert profile_model(tiny("olmoe"), rows()).layers[0].cooccurrence is None

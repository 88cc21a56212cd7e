"""S7: after anything done to its files a delta is refused as a user's error, or is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esft.delta import read_delta
from esft.errors import EsftError
from esft.shards import open_checkpoint
from tests.faults.material import Material, copy, values

# A file, as a fraction of the sorted names, and what becomes of its bytes.
Mutation = tuple[float, Callable[[bytes], bytes]]

FRACTIONS = st.floats(0, 1, exclude_max=True)
NAMES = ("format", "tensors", "rows", "shape", "coded", "bytes", "sha256", "..", "")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(NAMES)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=4,
)


def at(data: bytes, fraction: float) -> int:
    return int(fraction * len(data))


@st.composite
def flips(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    bits = draw(st.lists(st.tuples(FRACTIONS, st.integers(0, 7)), min_size=1, max_size=4))

    def apply(data: bytes) -> bytes:
        changed = bytearray(data)
        for fraction, bit in bits if data else []:
            changed[at(data, fraction)] ^= 1 << bit
        return bytes(changed)

    return apply


@st.composite
def splices(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut a piece out, put another in its place."""
    start, end = sorted((draw(FRACTIONS), draw(FRACTIONS | st.just(1.0))))
    piece = draw(st.binary(max_size=16))
    return lambda data: data[: at(data, start)] + piece + data[at(data, end) :]


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Replace, drop or double something in JSON; in a weights file, in its header."""
    path = draw(st.lists(FRACTIONS, min_size=1, max_size=4))
    value, drop = draw(JSON), draw(st.booleans())

    def edited(text: bytes) -> bytes:
        content = json.loads(text)
        place = content
        for fraction in path[:-1]:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            deeper = place[keys[int(fraction * len(keys))]] if len(keys) else None
            if not isinstance(deeper, dict | list) or not deeper:
                break
            place = deeper
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(path[-1] * len(keys))]
        if drop:
            del place[key]
        else:
            place[key] = value
        return json.dumps(content).encode()

    def apply(data: bytes) -> bytes:
        if data[:1] == b"{":
            return edited(data)
        length = int.from_bytes(data[:8], "little")
        header = edited(data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return apply


MUTATIONS = st.tuples(FRACTIONS, flips() | splices() | edits())


@pytest.fixture(scope="module")
def mutable(material: Material, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mutated")
    kinds = ("plain", "sharded", "coded", "low_rank")
    return [copy(getattr(material, kind), root / kind) for kind in kinds]


@settings(
    max_examples=2000,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.integers(0, 3),
    mutations=st.lists(MUTATIONS, min_size=1, max_size=2),
    swap=st.booleans(),
)
def test_s7_two_thousand_mutations(
    kind: int, mutations: list[Mutation], swap: bool, mutable: list[Path], material: Material
) -> None:
    """In one file, in several, compressed, or as factors; all as they were after the example."""
    folder, base = mutable[kind], open_checkpoint(material.base)
    original = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    names = list(original)
    try:
        for fraction, mutate in mutations:
            name = names[int(fraction * len(names))]
            if (folder / name).read_bytes() == original[name]:  # once: an edit needs its JSON
                (folder / name).write_bytes(mutate(original[name]))
        if swap:
            first, second = (folder / names[int(f * len(names))] for f in (mutations[0][0], 0.99))
            one, other = first.read_bytes(), second.read_bytes()
            first.write_bytes(other)
            second.write_bytes(one)
        delta = read_delta(folder)
        assert values(delta, base) == (material.low_rank_values if kind == 3 else material.values)
        assert (delta.rows, delta.base) == (material.rows, material.fingerprint)
    except EsftError:
        pass
    finally:
        for name, data in original.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                (folder / name).write_bytes(data)

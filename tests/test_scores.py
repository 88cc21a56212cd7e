"""Scores: the file, the official files, the official routing logs, and damaged ones."""

from __future__ import annotations

import copy
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from esft.errors import SelectionError
from esft.routing_logs import import_logs
from esft.scores import UNKNOWN_MODEL, LayerScores, Scores

OFFICIAL = Path(__file__).parents[2] / "shared" / "golden" / "official-esft"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"the official files are not in {OFFICIAL}"
)

FILE: dict[str, Any] = {
    "format": "esft-scores/1",
    "model": {"name": "m", "parameters": 1000},
    "sample": {"data": "train.jsonl", "count": "all", "tokens": 4},
    "stability": {"p": 0.2, "token": 0.9, "gate": 1.0},
    "layers": {
        "1": {
            "experts": 3,
            "top_k": 2,
            "tokens": 4,
            "token": [0.5, 0.25, 0.25],
            "gate": [0.4, 0.1, 0.3],
        }
    },
}


def test_a_file_survives_reading_and_writing(tmp_path: Path) -> None:
    scores = Scores.from_dict(FILE)
    assert scores.layers == {1: LayerScores(3, 2, 4, [0.5, 0.25, 0.25], [0.4, 0.1, 0.3])}
    scores.write(tmp_path / "scores.json")
    expected = FILE | {"model": UNKNOWN_MODEL | FILE["model"]}
    assert json.loads((tmp_path / "scores.json").read_text()) == expected
    assert Scores.read(tmp_path / "scores.json") == scores


FULL: dict[str, Any] = copy.deepcopy(FILE)
FULL["layers"]["1"] |= {
    "halves": [
        {"tokens": 2, "token": [0.5, 0.5, 0.0], "gate": [0.4, 0.2, 0.0]},
        {"tokens": 2, "token": [0.5, 0.0, 0.5], "gate": [0.4, 0.0, 0.6]},
    ],
    "routing": {
        "entropy": 0.9,
        "imbalance": 1.5,
        "dropped": {"1": 0.1, "2": 0.0},
        "fixed_by_token": {"share": 0.8, "without_id": 0.7, "token_ids": 3, "tokens": 4},
    },
    "cooccurrence": [[4, 2, 2], [2, 2, 0], [2, 0, 2]],
}


def test_what_profiling_adds_survives_reading_and_writing(tmp_path: Path) -> None:
    scores = Scores.from_dict(FULL)
    layer = scores.layers[1]
    assert [half.metric("gate")[2] for half in layer.halves] == [0.0, 0.6]
    assert layer.routing is not None
    assert layer.routing.fixed_by_token is not None
    assert (layer.routing.dropped["1"], layer.routing.fixed_by_token.share) == (0.1, 0.8)
    assert layer.counts() == [4, 2, 2]
    scores.write(tmp_path / "scores.json")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["layers"] == FULL["layers"]
    assert Scores.read(tmp_path / "scores.json") == scores


def test_counts_need_the_number_of_tokens() -> None:
    with pytest.raises(SelectionError, match="do not say"):
        LayerScores(2, None, None, [0.5, 0.5], [0.5, 0.5]).counts()


@needs_official
def test_official_scores_are_read() -> None:
    scores = Scores.read(OFFICIAL / "intent.scores.json")
    raw = json.loads((OFFICIAL / "intent.scores.json").read_text())
    assert sorted(scores.layers) == list(range(1, 27))
    for layer, item in scores.layers.items():
        assert item.experts == 64
        for expert in range(64):
            assert item.token[expert] == raw["token_scores"][str(layer)][str(expert)]
            assert item.gate[expert] == raw["gate_scores"][str(layer)][str(expert)]


@needs_official
def test_official_logs_give_the_official_scores() -> None:
    """The published scores are rounded to 4 decimals; every digit that they have must agree."""
    published = Scores.read(OFFICIAL / "intent.scores.json")
    found = import_logs(OFFICIAL / "logs")
    assert sorted(found.layers) == [1, 17]
    for layer, item in found.layers.items():
        assert (item.experts, item.top_k, item.tokens) == (64, 6, 8222)
        assert [round(score, 4) for score in item.token] == published.layers[layer].token
        assert [round(score, 4) for score in item.gate] == published.layers[layer].gate


def write_log(path: Path, sequences: list[list[tuple[list[int], list[float]]]]) -> None:
    lines = []
    for tokens in sequences:
        ids = "\t".join(str(i) for chosen, _ in tokens for i in chosen)
        gates = "\t".join(str(g) for _, weights in tokens for g in weights)
        lines.append(f"{ids}\t\t{gates}\n")
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["expert_weights_3.txt", "intent_expert_weights_3.txt.gz"])
def test_logs_against_a_plain_loop(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    sequences = [
        [
            (rng.sample(range(10), 3), [round(rng.random(), 4) for _ in range(3)])
            for _ in range(length)
        ]
        for length in (5, 1, 17)
    ]
    write_log(tmp_path / name, sequences)
    counts, sums = [0] * 10, [0.0] * 10
    for tokens in sequences:
        for chosen, weights in tokens:
            for expert, gate in zip(chosen, weights, strict=True):
                counts[expert] += 1
                sums[expert] += gate
    for path in (tmp_path, tmp_path / name):
        found = import_logs(path, top_k=3)
        item = found.layers[3]
        assert (item.experts, item.top_k, item.tokens) == (10, 3, 23)
        assert item.token == pytest.approx([count / 3 / 23 for count in counts], abs=1e-15)
        assert item.gate == pytest.approx([total / 23 for total in sums], abs=1e-15)
        assert found.sample["sequences"] == 3
    assert import_logs(tmp_path, top_k=3, experts=12).layers[3].token[10:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0\t1\t0.5\t0.5\n", "two tabs"),
        ("0\t1\t\t0.5\n", "2 expert ids but 1 gate values"),
        ("0\t1\t2\t\t0.5\t0.5\t0.1\n", "3 expert ids cannot be 2 a token"),
        ("0\t0\t\t0.5\t0.5\n", "same expert twice"),
        ("0\tx\t\t0.5\t0.5\n", "'x'"),
        ("0\t1\t\t0.5\tnan\n", "not finite"),
        ("0\t1\t\t0.5\t-1\n", "negative"),
        ("0\t-1\t\t0.5\t0.5\n", "negative"),
        ("0\t99999999999\t\t0.5\t0.5\n", "far too high"),
        ("\t\t\n0\t\t\n", "could not convert"),
    ],
)
def test_bad_log_lines_are_named(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "expert_weights_1.txt"
    log.write_text("0\t1\t\t0.5\t0.5\n" + text)
    with pytest.raises(SelectionError) as caught:
        import_logs(tmp_path, top_k=2)
    line = 3 if text.startswith("\t\t\n") else 2  # a line of nothing but tabs is blank
    assert str(caught.value).startswith(f"{log}:{line}: ")
    assert reason in str(caught.value)


def test_bad_log_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="no such file or folder"):
        import_logs(tmp_path / "none")
    with pytest.raises(SelectionError, match="no logs here"):
        import_logs(tmp_path)
    log = tmp_path / "expert_weights_1.txt"
    log.write_text("\n")
    with pytest.raises(SelectionError, match="no tokens"):
        import_logs(tmp_path)
    token = ([0, 1], [0.5, 0.5])
    write_log(log, [[token] * 3])
    with pytest.raises(SelectionError, match=r"--experts 1.*has an expert 1"):
        import_logs(tmp_path, top_k=2, experts=1)
    with pytest.raises(SelectionError, match="--top-k 0"):
        import_logs(tmp_path, top_k=0)
    write_log(tmp_path / "expert_weights_2.txt.gz", [[token] * 2])
    with pytest.raises(SelectionError, match="layer 2 has 2 tokens and layer 1 has 3"):
        import_logs(tmp_path, top_k=2)
    write_log(tmp_path / "other_expert_weights_1.txt", [[token]])
    with pytest.raises(SelectionError, match="layer 1 twice"):
        import_logs(tmp_path, top_k=2)


@pytest.mark.parametrize("cut", [5, 25])
def test_a_truncated_gzip_log_is_named(tmp_path: Path, cut: int) -> None:
    log = tmp_path / "expert_weights_1.txt.gz"
    write_log(log, [[([0, 1], [0.5, 0.5])] * 50])
    log.write_bytes(log.read_bytes()[:cut])
    with pytest.raises(SelectionError, match=r"expert_weights_1\.txt\.gz:1: cannot read"):
        import_logs(tmp_path, top_k=2)


def broken(**changes: Any) -> dict[str, Any]:
    """Return FILE with a change in layer 1."""
    value = copy.deepcopy(FILE)
    value["layers"]["1"] |= changes
    return value


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([], ["object"]),
        ({}, ["esft-scores/1", "token_scores"]),
        (FILE | {"format": "esft-scores/2"}, ["esft-scores/1"]),
        (FILE | {"sampel": {}}, ["sampel", 'did you mean "sample"']),
        (FILE | {"layers": {}}, ["no layers"]),
        (FILE | {"layers": {"a": {}}}, ["layers", '"a"']),
        (FILE | {"model": []}, ["model"]),
        (FILE | {"model": {"parameters": -1}}, ["model", "parameters"]),
        (FILE | {"model": {"name": 1}}, ["model", "name"]),
        (FILE | {"stability": {"token": "high"}}, ["stability", "token"]),
        (broken(token=[0.5, 0.5]), ["layer 1", "token", "2 scores for 3 experts"]),
        (broken(gate=[0.5, float("nan"), 0.5]), ["layer 1", "gate", "expert 1"]),
        (broken(gate=[0.5, -0.1, 0.5]), ["layer 1", "gate", "expert 1"]),
        (broken(gate=[0.5, True, 0.5]), ["layer 1", "gate", "expert 1"]),
        (broken(gate=None), ["layer 1", "gate", "missing"]),
        (broken(experts=None), ["layer 1", "experts"]),
        (broken(experts=0), ["layer 1", "experts"]),
        (broken(top_k=4), ["layer 1", "top_k"]),
        (broken(tokens=1.5), ["layer 1", "tokens"]),
        (broken(tokem=[1]), ["layer 1", 'did you mean "token"']),
        (broken(halves={}), ["layer 1", "halves", "two"]),
        (broken(halves=[FULL["layers"]["1"]["halves"][0]]), ["layer 1", "halves", "two"]),
        (broken(halves=[{}, {}]), ["layer 1", "halves: 0", "tokens"]),
        (
            broken(halves=[{"tokens": 1, "token": [1], "gate": [1, 1, 1]}] * 2),
            ["layer 1", "halves: 0: token", "1 scores for 3 experts"],
        ),
        (broken(routing={"entropi": 1}), ["layer 1", "routing", 'did you mean "entropy"']),
        (broken(routing={"dropped": {"3": 1}}), ["layer 1", "dropped", '"3"']),
        (broken(routing={"entropy": "high", "imbalance": 1, "dropped": {}}), ["entropy"]),
        (
            broken(routing=FULL["layers"]["1"]["routing"] | {"fixed_by_token": {"share": -1}}),
            ["layer 1", "fixed_by_token: share"],
        ),
        (broken(cooccurrence=[[1]]), ["layer 1", "cooccurrence", "3 rows"]),
        (broken(cooccurrence=[[1, 1, 1], [1, 1], [1, 1, 1]]), ["cooccurrence", "row 1"]),
        (broken(cooccurrence=[[1, 1, 1], [1, 1, 0.5], [1, 0.5, 1]]), ["cooccurrence", "row 1"]),
        (broken(cooccurrence=[[1, 2, 3], [2, 1, 5], [3, 4, 1]]), ["experts 1 and 2: 5 one way"]),
        ({"token_scores": {"1": {"0": 1}}}, ["gate_scores"]),
        ({"token_scores": {"1": {"0": 1}}, "gate_scores": {"2": {"0": 1}}}, ["layer 1"]),
        ({"token_scores": {"1": {"1": 1}}, "gate_scores": {}}, ["token_scores", "layer 1"]),
        ({"token_scores": {"1": {"0": None}}, "gate_scores": {}}, ["token_scores", "expert 0"]),
    ],
)
def test_bad_scores_are_named(value: Any, names: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        Scores.from_dict(value, where="here.json")
    assert str(caught.value).startswith("here.json: ")
    for name in names:
        assert name in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"none\.json: no such scores file"):
        Scores.read(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"format":\n')
    with pytest.raises(SelectionError, match=r"broken\.json:2: not JSON"):
        Scores.read(tmp_path / "broken.json")

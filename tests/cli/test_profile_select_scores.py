"""`esft profile`, `esft select`, `esft scores import`: what they write, print and refuse."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import esft as library
from esft.scores import Scores
from esft.selection import Selection
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, esft_process, refusal

OFFICIAL = Path(__file__).parents[3] / "shared" / "golden" / "official-esft"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "deepseek_v2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {n} in words: ", "completion": "x" * (n % 7 + 1)} for n in range(40)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "given.json"
    layer = {"experts": 4, "top_k": 1, "tokens": 10, "token": [0.1, 0.2, 0.3, 0.4]}
    model = {"parameters": 1000, "routed_parameters": 800, "expert_parameters": 100}
    path.write_text(
        json.dumps(
            {
                "format": "esft-scores/1",
                "model": model | {"bytes_per_parameter": 2},
                "sample": {"count": "all"},
                "layers": {index: layer | {"gate": [0.4, 0.3, 0.2, 0.1]} for index in ("1", "2")},
            }
        )
    )
    return path


def only(folder: Path, *names: str) -> bool:
    """Whether a folder holds these files and nothing else, half-written or hidden."""
    return sorted(item.name for item in folder.iterdir()) == sorted(names)


def printed_rows(table: str) -> dict[str, str]:
    """Return a printed table of names and values, without its title."""
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in table.splitlines()[1:]]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_profile_writes_scores(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    options = ["--tokens", "300", "--seq-len", "16", "--seed", "3", "--count", "prompt"]
    printed = esft_json("profile", checkpoint, "--data", data, "--out", out, *options)
    written = Scores.read(out)
    # 20 tokens of prompt a row: BOS, "say ", digits, " in words: "; cut to 16, nothing else left.
    assert written.sample == {
        "count": "prompt",
        "tokens": 300,
        "sequences": 19,
        "data": str(data),
        "seq_len": 16,
        "seed": 3,
    }
    assert printed == {
        "out": str(out),
        "model": written.model,
        "sample": written.sample,
        "stability": written.stability,
        "routing": {str(index): asdict(layer.routing) for index, layer in written.layers.items()},
    }
    assert sorted(written.layers) == [1, 2]
    again = library.profile(checkpoint, data, tokens=300, seq_len=16, seed=3, count="prompt")
    assert again == written
    other = library.profile(checkpoint, data, tokens=300, seq_len=16, seed=4, count="prompt")
    assert other.layers != written.layers


def test_profile_prints_a_table(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    result = esft_process("profile", checkpoint, "--data", data, "--out", tmp_path / "s.json")
    assert result.returncode == 0, result.stderr
    assert "tokens counted" in result.stdout
    for words in ("stability, token", "routing entropy", "capacity factor 1.25", "token's id"):
        assert words in result.stdout
    assert "tokens/s" in result.stderr


def test_a_checkpoint_in_half_precision_is_told_by_its_dtype(tmp_path: Path, data: Path) -> None:
    folder = save_tiny(tmp_path / "fp32", "olmoe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    save_tiny(tmp_path / "bf16", "olmoe")  # for its tokenizer
    model.save_pretrained(tmp_path / "bf16")
    widths = [
        library.profile(tmp_path / name, data, tokens=50).model["bytes_per_parameter"]
        for name in ("fp32", "bf16")
    ]
    assert widths == [4, 2]


def test_select_writes_and_prints(scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    result = esft_process("select", scores, "--out", out, "--metric", "gate", "--p", "0.5")
    assert result.returncode == 0, result.stderr
    assert Selection.read(out).experts == {1: [0, 1], 2: [0, 1]}
    rows = printed_rows(result.stdout)
    assert rows["layers"] == "2"
    assert rows["experts per layer"] == "2 at least, 2 median, 2 at most; 4 in all"
    assert rows["parameters"] == "400"
    assert rows["share of the model"] == "40.0 %"
    assert rows["share of the experts"] == "50.0 %"
    assert rows["size of the delta"] == "800 B"


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ([], {"1": [3], "2": [3]}),
        (["--p", "0.75", "--mass", "raw", "--layers", "2"], {"2": [3, 2, 1]}),
        (["--top-n", "2"], {"1": [3, 2], "2": [3, 2]}),
        (["--budget", "30%"], {"1": [3, 2], "2": [3]}),
        (["--budget", "450B"], {"1": [3], "2": [3]}),
        (["--round", "0", "--top-n", "1"], {"1": [0], "2": [0]}),
        (["--preset", "official-gate"], {"1": [0], "2": [0]}),
    ],
)
def test_select_options(
    scores: Path, tmp_path: Path, options: list[str], experts: dict[str, list[int]]
) -> None:
    out = tmp_path / "selection.json"
    esft_json("select", scores, "--out", out, *options)
    assert json.loads(out.read_text())["experts"] == experts


def test_select_finds_p_and_selects_groups(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    scores, out = tmp_path / "scores.json", tmp_path / "selection.json"
    esft_json("profile", checkpoint, "--data", data, "--out", scores, "--cooccurrence")
    options = ["--p", "auto", "--cover", "0.4", "--group", "2"]
    found = esft_json("select", scores, "--out", out, *options)
    auto = found["rule"]["auto"]
    assert auto["covered"] >= auto["cover"] == 0.4
    assert found["rule"]["p"] == auto["p"] == Selection.read(out).rule["p"]
    assert (found["rule"]["group"], found["summary"]["experts"] % 2) == (2, 0)
    result = esft("select", scores, "--out", out, *options)
    assert result.stdout.splitlines()[-1] == auto["why"]
    # The printed p selects the same experts.
    again = tmp_path / "again.json"
    esft_json("select", scores, "--out", again, "--p", auto["p"], "--group", "2")
    assert Selection.read(again).experts == Selection.read(out).experts


def test_select_takes_no_other_word_for_p(scores: Path, tmp_path: Path) -> None:
    result = esft("select", scores, "--out", tmp_path / "s.json", "--p", "much")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--p" in result.stderr


def test_select_random_is_a_control_of_the_same_size(scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    found = esft_json("select", scores, "--out", out, "--p", "0.5", "--random", "7")
    assert found["rule"]["random"] == 7
    assert (found["summary"]["experts"], found["summary"]["layers"]) == (4, 2)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official files are not in {OFFICIAL}")
def test_official_files_through_the_command(tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    found = esft(
        "select", OFFICIAL / "intent.scores.json", "--out", out, "--preset", "official-token"
    )
    assert found.returncode == 0, found.stderr
    expected = json.loads((OFFICIAL / "intent.config.json").read_text())
    written = json.loads(out.read_text())
    assert {key: written[key] for key in expected} == expected
    rows = printed_rows(found.stdout)
    assert rows["layers"] == "26"
    assert rows["experts per layer"] == "4 at least, 5 median, 6 at most; 124 in all"
    # The official file does not say what model it is of.
    assert (rows["parameters"], rows["share of the model"], rows["size of the delta"]) == ("?",) * 3


def test_scores_import(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    text = "0\t1\t1\t2\t\t0.5\t0.25\t0.5\t0.25\n"
    (logs / "expert_weights_4.txt").write_text(text)
    (logs / "expert_weights_5.txt.gz").write_bytes(gzip.compress(text.encode()))
    out = tmp_path / "scores.json"
    found = esft_json("scores", "import", logs, "--out", out, "--top-k", "2")
    assert (found["layers"], found["experts"]) == ([4, 5], 3)
    layer = Scores.read(out).layers[5]
    assert layer.token == [0.25, 0.5, 0.25]
    assert layer.gate == [0.25, 0.375, 0.125]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--p", "0"], "--p must be above 0 and at most 1"),
        (["--p", "1.5"], "--p must be above 0 and at most 1"),
        (["--p", "0.3", "--top-n", "2"], "--p and --top-n"),
        (["--budget", "1%"], "--budget 1% selects nothing"),
        (["--layers", "9"], "--layers 9"),
    ],
)
def test_select_refuses(scores: Path, tmp_path: Path, options: list[str], names: str) -> None:
    assert names in refusal("select", scores, "--out", tmp_path / "s.json", *options)
    assert only(tmp_path, scores.name)


def test_select_refuses_bad_files(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    assert "none.json: no such scores file" in refusal("select", "none.json", "--out", out)
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": "esft-scores/1",\n')
    assert f"{broken}:2: not JSON" in refusal("select", broken, "--out", out)
    assert only(tmp_path, "broken.json")


def test_a_write_that_fails_leaves_the_old_file(scores: Path, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("kept")
    assert "cannot write" in refusal("select", scores, "--out", target / "s.json")
    assert target.read_text() == "kept"
    assert only(tmp_path, "file", scores.name)


def test_profile_refuses_bad_data(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    text = data.read_text()
    assert "none.jsonl" in refusal("profile", checkpoint, "--data", "none.jsonl", "--out", out)
    data.write_text(text + '{"prompt": "a", "compl\n')
    found = refusal("profile", checkpoint, "--data", data, "--out", out)
    assert f"{data}:41: " in found
    data.write_text(text + '{"prompt": "a"}\n')
    found = refusal("profile", checkpoint, "--data", data, "--out", out)
    assert f"{data}:41: a line without an answer" in found
    assert only(tmp_path, data.name)


def test_profile_refuses_bad_options(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    start = ["profile", checkpoint, "--data", data, "--out", out]
    assert "--tokens 0" in refusal(*start, "--tokens", "0")
    assert '--count "answers"' in refusal(*start, "--count", "answers")
    assert "--dtype int4" in refusal(*start, "--dtype", "int4")
    assert only(tmp_path, data.name)


def test_profile_refuses_a_dense_model(data: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    out = tmp_path / "scores.json"
    found = refusal("profile", tmp_path / "dense", "--data", data, "--out", out)
    assert "llama: this model is dense" in found
    assert only(tmp_path, "dense", data.name)


@pytest.mark.parametrize("verb", [["profile"], ["select"], ["scores"], ["scores", "import"]])
def test_help(verb: list[str]) -> None:
    result = esft(*verb, "--help")
    assert result.returncode == 0
    assert "Usage:" in result.stdout

"""`esft.evaluate`: a checkpoint, with and without a delta, by every metric and on other domains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import corpus_chrf

import esft
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.errors import CheckError, DataError, EsftError, ModelError
from esft.evaluating import evaluate
from esft.evaluation import evaluate_model
from esft.generation import generate_text
from esft.inference import load
from tests.checkpoints import save_tiny
from tests.models import tiny
from tests.toy_tokenizers import CHATML


def write_data(path: Path, count: int = 6) -> Path:
    lines = [json.dumps({"prompt": f"{n}+{n}=", "completion": str(2 * n)}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


def test_evaluate_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_data(tmp_path / "test.jsonl")
    examples = encode_rows(read_rows(data), AutoTokenizer.from_pretrained(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = evaluate_model(model, examples)
    found = esft.evaluate(checkpoint, data)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert (found.rows, found.tokens, found.matched) == (6, expected.tokens, expected.matched)
    assert evaluate(str(checkpoint), str(data), max_rows=2, dtype="bfloat16").rows == 2
    score = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found.to_dict() == {
        "scores": {"exact_match": score},
        "rows": 6,
        "tokens": found.tokens,
        "matched": 0,
        "loss": found.loss,
        "exact_match": 0.0,
        "perplexity": found.perplexity,
    }


def test_evaluate_with_a_delta(checkpoint: Path, tmp_path: Path) -> None:
    delta = save_delta(checkpoint, tmp_path / "delta")
    data = write_data(tmp_path / "test.jsonl")
    esft.merge(checkpoint, delta, tmp_path / "merged")
    alone, merged = evaluate(checkpoint, data), evaluate(tmp_path / "merged", data)
    assert abs(alone.loss - merged.loss) > 1e-3
    assert evaluate(checkpoint, data, delta=delta).loss == pytest.approx(merged.loss, abs=1e-6)
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(CheckError):
        evaluate(other, data, delta=delta)


def save_delta(base: Path, folder: Path) -> Path:
    """Write a delta in which two experts of each layer are different from the base's."""
    from esft.changes import expert_changes
    from esft.delta import write_delta
    from esft.fingerprint import fingerprint
    from esft.loading import load_model
    from esft.moe import moe_layers
    from esft.selection import Selection
    from esft.shards import open_checkpoint

    model = load_model(base)
    chosen = {layer.index: [1, 3] for layer in moe_layers(model)}
    esft.attach(model, Selection(experts=chosen))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    folder.mkdir()
    write_delta(
        folder,
        fingerprint(open_checkpoint(base)),
        expert_changes(model),
        {"method": "esft", "base": {"name": str(base)}},
    )
    return folder


@pytest.mark.parametrize("max_rows", [0, -1])
def test_max_rows(max_rows: int, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--max-rows"):
        evaluate(checkpoint, write_data(tmp_path / "test.jsonl"), max_rows=max_rows)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    tiny("qwen3_moe").save_pretrained(folder)  # 64 tokens only
    with pytest.raises(ModelError, match="259 tokens and the model embeds 64"):
        evaluate(folder, write_data(tmp_path / "test.jsonl"))


def test_answers_are_what_the_model_writes(checkpoint: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "test.jsonl")
    found = evaluate(checkpoint, data, metrics=["chrf", "exact_match"], max_new_tokens=5)
    model, tokenizer = load(checkpoint)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [generate_text(model, tokenizer, row["prompt"], max_new_tokens=5) for row in rows]
    assert [answer["answer"] for answer in found.answers] == texts
    expected = corpus_chrf(
        [text.strip() for text in texts], [[row["completion"].strip() for row in rows]]
    )
    assert found.scores["chrf"].value == pytest.approx(expected.score / 100)
    assert list(found.scores) == ["chrf", "exact_match"]
    found.write_answers(tmp_path / "answers.jsonl")
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert written == found.answers
    assert [row["where"] for row in written] == [f"{data}:{n}" for n in range(1, 7)]


def test_the_last_turn_of_a_conversation_is_asked_for(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", template=CHATML)
    said = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "last")]
    messages = [{"role": role, "content": content} for role, content in said]
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": messages}) + "\n")
    found = evaluate(base, data, metrics=["chrf"], max_new_tokens=6)
    model, tokenizer = load(base)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    answer = tokenizer.decode(written, skip_special_tokens=True)
    assert found.answers[0]["answer"] == answer
    expected = corpus_chrf([answer.strip()], [["last"]]).score / 100
    assert found.scores["chrf"].value == pytest.approx(expected)


def test_code_is_run_if_it_may_be(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "code.jsonl"
    row = {"prompt": "def one():", "completion": " return 1"}
    # What the model writes is no code, but a comment after this setup.
    rows = [row | {"setup": "# ", "tests": "pass"}, row | {"tests": "pass"}]
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(EsftError, match=r"^--metric: pass_at_1 runs code .*--allow-code"):
        evaluate(checkpoint, data, metrics=["pass_at_1"])
    found = evaluate(
        checkpoint, data, metrics=["pass_at_1"], allow_code=True, max_new_tokens=3, code_seconds=60
    )
    assert [answer["scores"]["pass_at_1"] for answer in found.answers] == [1.0, 0.0]


def test_other_domains(checkpoint: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "test.jsonl")
    general = tmp_path / "general"
    general.mkdir()
    write_data(general / "a.jsonl", 2)
    (general / "b.jsonl").write_text('{"text": "plain text"}\n')
    found = evaluate(checkpoint, data, general=general)
    assert found.general is not None
    assert list(found.general) == ["a", "b"]
    for name, loss in found.general.items():
        assert loss == pytest.approx(evaluate(checkpoint, general / f"{name}.jsonl").loss, abs=1e-6)
    assert found.general_loss == pytest.approx(sum(found.general.values()) / 2)
    written: dict[str, Any] = found.to_dict()
    assert written["general"] == found.general


def test_a_metric_that_is_unknown(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EsftError, match=r'--metric: no metric is called blue; did you mean "bleu"'):
        evaluate(checkpoint, write_data(tmp_path / "test.jsonl"), metrics=["blue"])

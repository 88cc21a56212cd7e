"""The tiny MoE that ships: its corpus, tasks, tokenizer and weights are what the scripts say."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import corpus
import lines
import packing
import pretrain
import publish
import pytest
import tasks
import texts
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "tiny_moe"
SHIPPED = ROOT / "esft" / "tiny_moe"
STRUCTURED = [d for d in corpus.DOMAINS if d.name not in ("code", "prose")]
MODEL = pytest.mark.skipif(
    not (SHIPPED / "model.safetensors").is_file(), reason="no weights in esft/tiny_moe yet"
)


@pytest.fixture(scope="module")
def tokens():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        SHIPPED, dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()


def first_documents(domain, count):
    """The domain's first `count` documents, both splits."""
    return list(itertools.chain(*corpus.build(domain, seed=0, limit=count).values()))


# Corpus


def test_corpus_is_the_same_in_every_process():
    """Different hash salts show a `hash()` or an unordered set in the path from seed to text."""
    program = (
        "import corpus, hashlib\n"
        "slow = 'prose', 'derivatives'\n"  # and prose needs packages that only pretraining needs
        "slices = [corpus.build(d, 0, 60) for d in corpus.DOMAINS if d.name not in slow]\n"
        "print(hashlib.sha256(repr(slices).encode()).hexdigest())\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": str(SCRIPTS)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for salt in ("1", "2")
    ]
    digests = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["sums", "intents"])
def test_corpus_matches_the_recorded_manifest(name):
    """The two domains that depend on no package's version rebuild to the recorded bytes."""
    manifest = json.loads((SCRIPTS / "results" / "manifest.json").read_text())
    (domain,) = (d for d in corpus.DOMAINS if d.name == name)
    for split, documents in corpus.build(domain, manifest["seed"]).items():
        text = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert digest == manifest["domains"][name][split]["sha256"]


@pytest.mark.parametrize("domain", STRUCTURED, ids=lambda d: d.name)
def test_splits_do_not_share_keys(domain):
    drawn = list(itertools.islice(domain.documents(random.Random(1)), 500))
    heldout = {document for key, document in drawn if corpus.is_heldout(key)}
    assert heldout.isdisjoint(document for key, document in drawn if not corpus.is_heldout(key))
    assert all(" = " in document for _, document in drawn)


def test_weights_sum_to_one():
    assert sum(d.weight for d in corpus.DOMAINS) == pytest.approx(1)


def test_a_missing_corpus_says_how_to_build_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.py"):
        corpus.read(tmp_path, "code", "train")


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        texts.package_root("no_such_package_of_tiny_moe")


def test_rows_never_begin_inside_a_short_document():
    documents = [[1, 10, 11, 2], [1, 20, 21, 22, 2], [1, *range(30, 45), 2], [1, 50, 2]]
    rows = packing.pack(documents, 8)
    assert rows.tolist() == [
        [1, 10, 11, 2, 1, 20, 21, 22],  # the second document does not fit ...
        [1, 20, 21, 22, 2, 1, 30, 31],  # ... and starts again; the third is longer than a row
        [32, 33, 34, 35, 36, 37, 38, 39],
        [40, 41, 42, 43, 44, 2, 1, 50],
    ]
    ids = torch.tensor(rows.astype("int64"))
    assert packing.positions(ids, bos=1).tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 0, 1],
    ]
    assert packing.model_inputs(ids, bos=1)["labels"][0].tolist() == [
        *(-100, 10, 11, 2),
        *(-100, 20, 21, 22),
    ]


def test_balance_loss_is_one_when_even_and_larger_when_not():
    even = pretrain.balance_loss(torch.zeros(8, 4), torch.arange(16).reshape(8, 2) % 4)
    assert even.item() == pytest.approx(1)
    logits = torch.tensor([[20.0, 0, 0, 0]]).expand(8, 4)
    collapsed = pretrain.balance_loss(logits, torch.zeros(8, 1, dtype=torch.long))
    assert collapsed.item() == pytest.approx(4, rel=1e-3)


# Tasks


@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda t: t.name)
def test_task_files_are_what_the_script_writes(task):
    splits = tasks.build(task)
    for split, rows in splits.items():
        shipped = (SHIPPED / "tasks" / task.name / f"{split}.jsonl").read_text(encoding="utf-8")
        assert shipped == tasks.as_jsonl(rows)
        for row in rows:
            assert row["prompt"].endswith(" =")
            assert row["completion"].startswith(" ")
            assert row["completion"] == row["completion"].rstrip()
    prompts = [{row["prompt"] for row in rows} for rows in splits.values()]
    assert prompts[0].isdisjoint(prompts[1])
    assert [len(splits["train"]), len(splits["test"])] == [task.train_rows, tasks.TEST_ROWS]


def test_at_least_six_tasks_ship_and_no_others_do():
    shipped = {p.name for p in (SHIPPED / "tasks").iterdir()}
    assert shipped == {t.name for t in tasks.TASKS}
    assert len(shipped) >= 6


def test_no_task_prompt_is_in_the_pretraining_text():
    prompts = set()
    for path in (SHIPPED / "tasks").glob("*/*.jsonl"):
        prompts |= {json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()}
    for domain in STRUCTURED:
        for document in first_documents(domain, 400):
            assert document.partition(" = ")[0] + " =" not in prompts
    # Whatever the seed draws: no line of the corpus starts as a task's prompt does.
    starts = {" ".join(prompt.split()[:1]) for prompt in prompts} - {"num"}
    kinds = {first_documents(domain, 1)[0].split()[0] for domain in STRUCTURED} | {"name"}
    assert starts.isdisjoint(kinds)
    assert "sv" not in lines.LANGUAGES
    code = "\n".join(first_documents(corpus.DOMAINS[0], 5))
    assert not [prompt for prompt in sorted(prompts)[::50] if prompt in code]


# Tokenizer


def test_tokenizer_returns_the_text_it_was_given(tokens):
    for text in ("num sv 42 = fyrtiotvå", "def f(x):\n\treturn  x  # ü 漢\n", ' {"a": 1}', "  "):
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        assert tokens.decode(ids) == text
        assert tokens(text)["input_ids"] == [tokens.bos_token_id, *ids]
    assert [tokens.pad_token_id, tokens.bos_token_id, tokens.eos_token_id] == [0, 1, 2]


def test_question_and_answer_tokenise_alike_together_and_apart(tokens):
    """Training sees them apart, pretraining saw its lines whole."""
    for path in (SHIPPED / "tasks").glob("*/test.jsonl"):
        for line in path.read_text("utf-8").splitlines()[:20]:
            row = json.loads(line)
            apart = tokens(row["prompt"])["input_ids"]
            apart = apart + tokens(row["completion"], add_special_tokens=False)["input_ids"]
            assert tokens(row["prompt"] + row["completion"])["input_ids"] == apart


def test_chat_template_marks_the_assistants_tokens_and_their_end(tokens):
    chat = [
        {"role": "user", "content": "hi 1"},
        {"role": "assistant", "content": "yes 42"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "no"},
    ]
    assert tokens.apply_chat_template(chat, tokenize=False) == (
        "<s><|user|>hi 1<|assistant|>yes 42</s><|user|>and<|assistant|>no</s>"
    )
    encoded = tokens.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = itertools.compress(encoded["input_ids"], encoded["assistant_masks"])
    assert tokens.decode(list(marked)) == "yes 42</s>no</s>"
    question = tokens.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert question == "<s><|user|>hi 1<|assistant|>"
    with pytest.raises(Exception, match="roles user and assistant"):
        tokens.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


# Weights


@MODEL
def test_weights_are_small_and_stored_by_expert():
    assert sum(p.stat().st_size for p in SHIPPED.iterdir() if p.is_file()) <= 12_000_000
    with safe_open(SHIPPED / "model.safetensors", "pt") as weights:
        name = "model.layers.1.mlp.experts.63.down_proj.weight"
        assert weights.get_slice(name).get_shape() == [160, 32]
        assert weights.get_tensor(name).dtype == torch.bfloat16


@MODEL
def test_model_card_states_the_recorded_figures():
    assert (SHIPPED / "README.md").read_text("utf-8") == publish.card(SHIPPED, publish.RESULTS)


# About 15 % above what the shipped model scores on these lines, far below an untrained 7.6 nats.
BOUNDS = {"numbers": 0.93, "sounds": 1.82, "sums": 1.50, "intents": 0.54, "symbols": 1.66}


@MODEL
@pytest.mark.parametrize("name", BOUNDS)
def test_shipped_model_predicts_heldout_lines(name, model, tokens):
    (domain,) = (d for d in corpus.DOMAINS if d.name == name)
    documents = corpus.build(domain, seed=0, limit=3_000)["heldout"][:40]
    rows = packing.pack(packing.encode(documents, tokens), 64)
    loss = pretrain.heldout_loss(model, {name: torch.from_numpy(rows.astype("int64"))})[name]
    assert loss < BOUNDS[name]


@MODEL
def test_shipped_model_answers_and_stops(model, tokens):
    prompt = "intent play some jazz in the kitchen ="
    ids = model.generate(**tokens(prompt, return_tensors="pt"), max_new_tokens=60)[0]
    assert tokens.decode(ids, skip_special_tokens=True) == (
        f'{prompt} {{"intent": "music", "style": "jazz", "room": "kitchen"}}'
    )
    assert ids[-1] == tokens.eos_token_id

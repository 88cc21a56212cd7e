"""What `frozen_dtype` saves, and what it does to the loss.

`memory` trains a random checkpoint of 0.4 GB for two steps with each kind, each in a process of its
own; what importing the libraries takes is measured in another one. `curve` trains tiny-moe for 50
steps on the same batches with each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = (None, "int8", "nf4")
STEPS = 50
SELECTED = {layer: [(7 * layer) % 64, (11 * layer + 3) % 64, 5, 60] for layer in (1, 2, 3, 4)}
# Of this program alone: `ru_maxrss` begins with what the process had that started it.
_PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=["memory", "curve"])
    for table in parser.parse_args().tables or ["memory", "curve"]:
        {"memory": memory, "curve": curve}[table]()


def memory() -> None:
    """Print the peak memory of a run with each kind."""
    imports = _peak("import esft.training")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _save_random(folder / "base")
        print(f"weights {size / 1e6:.0f} MB in bf16; imports {imports / 1e6:.0f} MB")
        print("| frozen_dtype | peak memory | above the imports |\n|---|---|---|")
        for kind in KINDS:
            recipe = _recipe(folder, kind)
            peak = _peak(f"import esft; esft.train({recipe!r}, {str(folder / str(kind))!r})")
            print(f"| {kind} | {peak / 1e6:.0f} MB | {(peak - imports) / 1e6:.0f} MB |", flush=True)


def curve() -> None:
    """Print how far the losses over rounded weights are from those over the loaded ones."""
    plain = losses({})
    print("| frozen_dtype | mean loss | change | largest change of a step |\n|---|---|---|---|")
    print(f"| None | {sum(plain) / STEPS:.4f} | | |", flush=True)
    for kind in KINDS[1:]:
        own = losses({"experts": kind, "linear": kind})
        change = sum(own) / sum(plain) - 1
        largest = max(abs(a / b - 1) for a, b in zip(own, plain, strict=True))
        print(f"| {kind} | {sum(own) / STEPS:.4f} | {change:+.2%} | {largest:.2%} |", flush=True)


def losses(kinds: dict[str, str]) -> list[float]:
    """Train four experts a layer of tiny-moe; return each step's loss."""
    import torch

    import esft
    from esft.loading import load_model, load_tokenizer
    from esft.locating import resolve
    from esft.quantising.checkpoint import load_quantised
    from esft.selection import Selection
    from esft.trained_parts import TrainedParts

    folder = resolve("tiny-moe")
    lines = (folder / "tasks" / "dates" / "train.jsonl").read_text().splitlines()[:256]
    rows = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(folder)
    ids = [t for row in rows for t in tokenizer(row["prompt"] + row["completion"]).input_ids]
    batches = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 4, 64)
    trained = TrainedParts()
    model = load_quantised(folder, kinds, trained) if kinds else load_model(folder)
    esft.attach(model, Selection(experts=SELECTED))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    found = []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def _save_random(folder: Path) -> int:
    """Save a random Qwen3-MoE of 4 layers; return the bytes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from esft.loading import load_tokenizer
    from esft.locating import resolve

    tokenizer = load_tokenizer(resolve("tiny-moe"))
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def _recipe(folder: Path, kind: str | None) -> dict[str, object]:
    from esft.selection import Selection

    rows, selection = folder / "rows.jsonl", folder / "selection.json"
    rows.write_text('{"prompt": "date June 27, 2019 =", "completion": " 2019-06-27"}\n' * 8)
    Selection(experts={layer: [1, 5] for layer in range(4)}).write(selection)
    return {
        "model": str(folder / "base"),
        "selection": str(selection),
        "data": {"train": str(rows), "max_length": 64},
        "training": {"max_steps": 2, "per_device_train_batch_size": 1},
        "dtype": "checkpoint",
        "routing_drift": False,
        "frozen_dtype": kind,
    }


def _peak(code: str) -> int:
    """Run code in a process of its own; return the most bytes that it had."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_PEAK}"],
        env=os.environ | threshold,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-2]) * 1024


if __name__ == "__main__":
    main()

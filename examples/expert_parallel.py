"""Processes that share a model, each with some experts of every layer, train the selected ones.

torchrun --nproc-per-node 2 examples/expert_parallel.py OUT

Each process loads its part of the weights only. All see the same batches.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import esft
from esft.data.batching import padded
from esft.data.rows import read_rows
from esft.gradients import clip_gradients
from esft.loading import load_tokenizer
from esft.locating import TINY_MOE_FOLDER
from esft.moe import trainable_parameters
from esft.processes import joined, rank
from esft.profiling import profile_model, sample_rows
from esft.saving import save_delta

out = Path(sys.argv[1] if len(sys.argv) > 1 else "expert-parallel")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40
base = TINY_MOE_FOLDER

with joined():
    N = dist.get_world_size()
    config = DistributedConfig(tp_size=N, ep_size=N)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, distributed_config=config
    )
    rows = read_rows(base / "tasks" / "dates" / "train.jsonl")
    examples = sample_rows(rows, load_tokenizer(base), tokens=16_384, seq_len=256, seed=0)

    scores = profile_model(model, examples)
    selection = esft.select(scores, metric="token", p=0.2)
    esft.attach(model, selection)

    # Not `foreach`: torch cannot take shared and whole parameters in one call.
    trained = trainable_parameters(model).values()
    optimizer = torch.optim.AdamW(trained, lr=3e-3, foreach=False)
    for step in range(steps):
        batch = [examples[(step * 8 + row) % len(examples)] for row in range(8)]
        ids, real = padded([example.input_ids for example in batch])
        labels, _ = padded([example.labels() for example in batch], fill=-100)
        loss = model(input_ids=ids, attention_mask=real, labels=labels).loss
        loss.backward()
        norm = clip_gradients(model, 1.0)  # of all processes' gradients; torch's sees its own
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, norm {norm:.2f}", flush=True)
    save_delta(model, out, base)  # put together, and written once

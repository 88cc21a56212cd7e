"""Pretrain tiny-moe on a built corpus: tokenizer, model, held-out loss per domain.

    OMP_NUM_THREADS=1 python examples/tiny_moe/pretrain.py --corpus build/tiny_moe/corpus \\
        --out build/tiny_moe/model --steps 13000

The recipe is steps and seed; no clock decides anything. Letters: B rows a step, S tokens a row,
T = B*S, E experts, K experts a token, N rows of a domain.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import corpus
import numpy as np
import packing
import tokenizer as tokenizers_of_tiny_moe
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

ROW = 256  # tokens
BATCH = 8  # rows
PEAK_RATE, FINAL_RATE, WARM_UP = 3e-3, 0.02, 200  # Adam's rate, its last share, steps
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
BALANCE = 0.003  # weight of the load-balance loss, each layer
SAVE_EVERY = 500  # steps
HELDOUT_ROWS = 24  # rows a domain


def configuration() -> DeepseekV2Config:
    """DeepSeek-V2 in miniature: 64 fine-grained routed experts and a shared one, softmax top-6."""
    return DeepseekV2Config(
        vocab_size=tokenizers_of_tiny_moe.VOCABULARY,
        hidden_size=160,
        intermediate_size=640,  # the first layer's dense MLP
        moe_intermediate_size=32,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        aux_loss_alpha=0.0,  # the balance loss is added here, not by the model
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=tokenizers_of_tiny_moe.CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def balance_loss(logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i * P_i: 1 when the load is even, up to E when one expert takes all.

    f_i is the share of the T*K choices that fell on expert i, P_i the mean router probability of
    expert i. Source: Switch Transformers (arXiv 2101.03961) eq. 4-6 for top-1, in the top-K form
    of GShard (arXiv 2006.16668).
    """
    experts = logits_TE.shape[-1]
    load_E = torch.bincount(chosen_TK.flatten(), minlength=experts) / chosen_TK.numel()
    return experts * (load_E * logits_TE.float().softmax(-1).mean(0)).sum()


def watch_routers(model: DeepseekV2ForCausalLM) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that each forward pass fills with (logits `[T, E]`, chosen `[T, K]`) per MoE layer."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _args, out: seen.append((out[0].flatten(0, -2), out[2].flatten(0, -2)))
        )
    return seen


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to FINAL_RATE of it."""
    warm = min(1.0, (step + 1) / WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def load_rows(folder: Path, split: str, tokens: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Every domain of a split, tokenised and packed once, int64 `[N, S]`."""
    rows = {}
    for domain in corpus.DOMAINS:
        documents = packing.encode(corpus.read(folder, domain.name, split), tokens)
        rows[domain.name] = torch.from_numpy(packing.pack(documents, ROW).astype(np.int64))
    return rows


class Batches:
    """Rows drawn from the domains by their weights, each domain in shuffled passes."""

    def __init__(self, rows: dict[str, torch.Tensor], seed: int) -> None:
        self.rows = rows
        self.random = np.random.default_rng(seed)
        self.weights = np.array([d.weight for d in corpus.DOMAINS])
        self.queues: dict[str, list[int]] = {name: [] for name in rows}

    def draw(self) -> torch.Tensor:
        """The next batch, int64 `[B, S]`."""
        names = list(self.rows)
        picked = self.random.choice(len(names), BATCH, p=self.weights / self.weights.sum())
        return torch.stack([self._row(names[i]) for i in picked])

    def _row(self, name: str) -> torch.Tensor:
        if not self.queues[name]:
            self.queues[name] = self.random.permutation(len(self.rows[name])).tolist()
        return self.rows[name][self.queues[name].pop()]


@torch.no_grad()
def heldout_loss(
    model: DeepseekV2ForCausalLM, rows: dict[str, torch.Tensor], limit: int | None = HELDOUT_ROWS
) -> dict[str, float]:
    """Mean next-token loss, in nats, over the first `limit` held-out rows of each domain."""
    was_training = model.training
    model.eval()
    bos = model.config.bos_token_id
    losses = {}
    for name, ids_NS in rows.items():
        total, tokens = 0.0, 0
        for ids_BS in ids_NS[:limit].split(BATCH):
            inputs = packing.model_inputs(ids_BS, bos)
            counted = int((inputs["labels"][:, 1:] != -100).sum())
            total += model(**inputs, use_cache=False).loss.item() * counted
            tokens += counted
        losses[name] = total / tokens
    model.train(was_training)
    return losses


def save(
    model: DeepseekV2ForCausalLM, tokens: PreTrainedTokenizerFast, out: Path, facts: dict
) -> None:
    """Write a bf16 checkpoint with its tokenizer and recipe; a reader sees the old or the new."""
    part, old = out.with_suffix(".part"), out.with_suffix(".old")
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    half = DeepseekV2ForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    ids = {
        f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    half.generation_config = GenerationConfig(do_sample=False, max_new_tokens=128, **ids)
    half.save_pretrained(part)
    tokens.save_pretrained(part)
    (part / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Train the tokenizer and the model; save and score every SAVE_EVERY steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("build/tiny_moe/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny_moe/model"))
    parser.add_argument("--steps", type=int, required=True, help="length of the cosine")
    parser.add_argument("--until", type=int, help="stop after this many of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    tokens = tokenizers_of_tiny_moe.train(args.corpus, args.seed)
    train, heldout = (load_rows(args.corpus, split, tokens) for split in ("train", "heldout"))
    print("rows", {k: (len(train[k]), len(heldout[k])) for k in train}, flush=True)

    model = DeepseekV2ForCausalLM(configuration())
    model.set_experts_implementation("grouped_mm")
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}],
        betas=BETAS,
        weight_decay=0.0,
        fused=True,
    )
    routers, batches, start = watch_routers(model), Batches(train, args.seed), time.time()
    last = min(args.until or args.steps, args.steps)
    for step in range(last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        inputs = packing.model_inputs(batches.draw(), tokens.bos_token_id)
        # Weights, gradients and optimizer stay fp32; the products run in bf16, a quarter faster.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        balance = torch.stack([balance_loss(*seen) for seen in routers])
        (loss + BALANCE * balance.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        routers.clear()
        done = step + 1
        if done % 50 == 0:
            rate = done * BATCH * ROW / (time.time() - start)
            line = {"step": done, "loss": loss.item(), "balance": balance.mean().item()}
            print(json.dumps(line | {"tokens_per_second": round(rate)}), flush=True)
        if done % SAVE_EVERY == 0 or done == last:
            losses = heldout_loss(model, heldout)
            routers.clear()
            facts = {"steps": args.steps, "done": done, "seed": args.seed, "batch": [BATCH, ROW]}
            save(model, tokens, args.out, facts | {"heldout_loss": losses})
            print("heldout", done, json.dumps(losses), flush=True)


if __name__ == "__main__":
    main()

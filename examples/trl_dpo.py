"""TRL's DPOTrainer trains selected experts on preferences; its reference is the base.

python examples/trl_dpo.py OUT [STEPS]
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import esft
from esft.locating import TINY_MOE_FOLDER

out = Path(sys.argv[1] if len(sys.argv) > 1 else "trl_dpo")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
file = TINY_MOE_FOLDER / "tasks" / "dates" / "train.jsonl"

# The right answer is preferred to another row's.
rows = [json.loads(line) for line in file.read_text().splitlines()]
pairs = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
    for row, other in pairwise(rows)
]

scores = esft.profile("tiny-moe", file, tokens=16_384)
model = AutoModelForCausalLM.from_pretrained(TINY_MOE_FOLDER, dtype="float32")
esft.attach(model, esft.select(scores, metric="token", p=0.2))

gpu = torch.cuda.is_available()
trainer = DPOTrainer(
    model,  # no ref_model: TRL loads the base once more, from where the model came from
    args=DPOConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-4,
        router_aux_loss_coef=0.0,  # the router is frozen
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
        bf16=gpu,
        use_cpu=not gpu,
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=AutoTokenizer.from_pretrained(TINY_MOE_FOLDER),
    callbacks=[esft.SaveDelta(out / "delta")],
)
trainer.train()

merged = esft.merge("tiny-moe", out / "delta", out / "merged")
verified = esft.verify("tiny-moe", out / "delta", merged)
print(f"all {verified.merged} tensors are the base's or the delta's")
logs = [line for line in trainer.state.log_history if "rewards/margins" in line]
for line in logs:
    margin, right = line["rewards/margins"], line["rewards/accuracies"]
    print(f"step {line['step']}: preferred by {margin:.2f}, {right:.0%} of the time")

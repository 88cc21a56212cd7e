"""TRL's SFTTrainer trains the experts that a task uses, and nothing else.

python examples/trl_sft.py OUT [STEPS]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import esft
from esft.locating import TINY_MOE_FOLDER

out = Path(sys.argv[1] if len(sys.argv) > 1 else "trl_sft")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
task = TINY_MOE_FOLDER / "tasks" / "dates"

scores = esft.profile("tiny-moe", task / "train.jsonl", tokens=16_384)
model = AutoModelForCausalLM.from_pretrained(TINY_MOE_FOLDER, dtype="float32")
esft.attach(model, esft.select(scores, metric="token", p=0.2))

gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model,
    SFTConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        router_aux_loss_coef=0.0,  # the router is frozen
        save_strategy="no",
        report_to="none",
        bf16=gpu,
        use_cpu=not gpu,
    ),
    train_dataset=load_dataset("json", data_files=str(task / "train.jsonl"), split="train"),
    processing_class=AutoTokenizer.from_pretrained(TINY_MOE_FOLDER),
    callbacks=[esft.SaveDelta(out / "delta")],
)
trainer.train()

merged = esft.merge("tiny-moe", out / "delta", out / "merged")
verified = esft.verify("tiny-moe", out / "delta", merged)
print(f"all {verified.merged} tensors are the base's or the delta's")
for name, checkpoint in (("before", "tiny-moe"), ("after", merged)):
    found = esft.evaluate(checkpoint, task / "test.jsonl")
    print(f"{name}: exact match {found.exact_match:.1%}, loss {found.loss:.2f}")

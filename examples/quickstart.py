"""The main job in Python: specialise the tiny MoE that ships with esft to a new task.

python examples/quickstart.py OUT
"""

import sys
from pathlib import Path

import esft
from esft.locating import TINY_MOE_FOLDER

out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
task = TINY_MOE_FOLDER / "tasks" / "dates"

scores = esft.profile("tiny-moe", task / "train.jsonl", tokens=16_384)
selection = esft.select(scores, metric="token", p=0.2)
selection.write(out / "selection.json")

recipe = {
    "model": "tiny-moe",
    "selection": str(out / "selection.json"),
    "data": {"train": str(task / "train.jsonl"), "max_length": 256},
    "training": {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "seed": 0,
    },
}
run = esft.train(recipe, out / "run")
merged = esft.merge("tiny-moe", run.delta, out / "merged")
esft.verify("tiny-moe", run.delta, merged)

for name, model in (("before", "tiny-moe"), ("after", merged)):
    found = esft.evaluate(model, task / "test.jsonl")
    print(f"{name}: exact match {found.exact_match:.1%}, loss {found.loss:.2f}")
print(f"trained {run.trained:,} of {run.total:,} parameters")

"""What the process really takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import VOCAB
from tests.command import Argument, python_process
from tests.models import tiny
from tests.toy_tokenizers import byte_tokenizer

EXPERTS, HIDDEN, INNER, LAYERS = 16, 512, 1024, 3
EXPERT = 3 * HIDDEN * INNER * 4

# The peak of a command that is the only child of its parent, in bytes.
PEAK = """
import json, resource, subprocess, sys
run = subprocess.run([sys.executable, "-m", "esft_cli", *sys.argv[1:]], capture_output=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([run.stdout.decode(), run.stderr.decode(), peak]))
"""


def generate(folder: Path, *options: Argument) -> tuple[str, int]:
    """Answer a prompt in a process of its own; return the answer and the process' peak."""
    arguments = ("generate", folder, "--prompt", "2+2=", "--max-new-tokens", "12", *options)
    result = python_process("-c", PEAK, *arguments)
    text, error, peak = json.loads(result.stdout)
    assert text, error
    return text, peak


@pytest.mark.slow
def test_a_process_stays_below_the_experts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny(
        "qwen3_moe",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text, whole = generate(tmp_path)
    few, peak = generate(tmp_path, "--expert-memory", 8 * EXPERT)
    assert few == text
    # Room for six more: the C library keeps blocks that were freed.
    assert whole - peak > (EXPERTS * LAYERS - 8 - 6) * EXPERT

"""Run in a process of its own that cannot import esft: loads a checkpoint, saves its logits.

Usage: python plain_transformers.py CHECKPOINT IDS.pt OUT.safetensors
"""

import sys


class _NoEsft:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("esft", "esft_kernels", "esft_cli"):
            raise ImportError(f"{name} must not be imported here")


sys.meta_path.insert(0, _NoEsft())

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main(checkpoint: str, ids: str, out: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    for parameter in model.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        logits = model(load_file(ids)["ids"]).logits
    weights = {f"weights.{k}": v.clone() for k, v in model.state_dict().items()}
    save_file({"logits": logits.clone()} | weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

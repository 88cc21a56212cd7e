"""Held-out loss per domain, and which experts each domain uses.

    python examples/tiny_moe/routing.py --corpus build/tiny_moe/corpus \\
        --out examples/tiny_moe/results/routing.json --picture examples/tiny_moe/routing.png

A domain's top experts are those that ESFT would select: highest token selection ratio (TSR) first,
until their sum reaches p. Letters: D domains, L MoE layers, E experts, K experts a token.
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import packing
import pretrain
import torch
from transformers import AutoTokenizer, DeepseekV2ForCausalLM

from esft.ranking import until

SHIPPED = Path(__file__).parents[2] / "esft" / "tiny_moe"
P = 0.2


@torch.no_grad()
def selection_ratios(
    model: DeepseekV2ForCausalLM, rows: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """TSR of each domain, float64 `[L, E]`: an expert's share of the K choices of every token."""
    experts = model.config.n_routed_experts
    seen = pretrain.watch_routers(model)
    ratios = {}
    for name, ids_NS in rows.items():
        counts_LE: torch.Tensor | int = 0
        for ids_BS in ids_NS[: pretrain.HELDOUT_ROWS].split(pretrain.BATCH):
            seen.clear()
            model(**packing.model_inputs(ids_BS, model.config.bos_token_id), use_cache=False)
            counts_LE = counts_LE + torch.stack(
                [torch.bincount(chosen.flatten(), minlength=experts) for _, chosen in seen]
            )
        ratios[name] = counts_LE.double() / counts_LE.sum(1, keepdim=True)
    return ratios


def overlap(ratios: dict[str, torch.Tensor], p: float) -> list[float]:
    """Per layer, the mean Jaccard index of the top experts over all pairs of domains."""
    layers = len(next(iter(ratios.values())))
    means = []
    for layer in range(layers):
        sets = [set(until(ratios_LE[layer].tolist(), p)) for ratios_LE in ratios.values()]
        pairs = list(itertools.combinations(sets, 2))
        means.append(sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
    return means


def draw(ratios: dict[str, torch.Tensor], first_layer: int, path: Path) -> None:
    """Heat map, one panel a layer: domains down, experts across, colour the TSR times E.

    1 is the load of an expert under even routing. Experts are sorted by the domain that uses them
    most, so that each domain's own experts stand together.
    """
    ratios_DLE = torch.stack(list(ratios.values()))
    domains, layers, experts = ratios_DLE.shape
    top = min(10.0, float(ratios_DLE.max()) * experts)
    figure, axes = plt.subplots(layers, 1, figsize=(10, 2.1 * layers), layout="constrained")
    for layer, axis in enumerate(axes):
        load_DE = ratios_DLE[:, layer] * experts
        order = sorted(range(experts), key=lambda e: (int(load_DE[:, e].argmax()), e))
        image = axis.imshow(load_DE[:, order], aspect="auto", cmap="magma", vmin=0, vmax=top)
        axis.set_yticks(range(domains), list(ratios))
        axis.set_xticks(range(experts), [str(e) for e in order], fontsize=5, rotation=90)
        axis.set_title(f"layer {first_layer + layer}", loc="left", fontsize=10)
    axes[-1].set_xlabel("routed expert, grouped by the domain that uses it most")
    figure.colorbar(image, ax=axes, label="times the load of even routing", shrink=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--corpus", type=Path, default=Path("build/tiny_moe/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny_moe/routing.json"))
    parser.add_argument("--picture", type=Path, default=Path("build/tiny_moe/routing.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = AutoTokenizer.from_pretrained(args.model)
    model = DeepseekV2ForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()
    rows = pretrain.load_rows(args.corpus, "heldout", tokens)
    losses = pretrain.heldout_loss(model, rows)
    ratios = selection_ratios(model, rows)
    facts = {
        "heldout_loss": losses,
        "p": P,
        "selected": {
            name: [until(r_E, P) for r_E in r_LE.tolist()] for name, r_LE in ratios.items()
        },
        "mean_jaccard_by_layer": overlap(ratios, P),
        "largest_load_by_layer": (
            torch.stack(list(ratios.values())).mean(0).amax(1) * model.config.n_routed_experts
        ).tolist(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(facts, indent=2) + "\n")
    draw(ratios, model.config.first_k_dense_replace, args.picture)
    print(json.dumps({k: v for k, v in facts.items() if k != "selected"}, indent=2))
    for name, layers in facts["selected"].items():
        print(f"{name:12}", *(f"{len(chosen):2}" for chosen in layers), "experts reach p")


if __name__ == "__main__":
    main()

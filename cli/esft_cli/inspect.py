"""`esft inspect MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esft_cli import output

if TYPE_CHECKING:
    from esft.moe import Anatomy


def inspect(
    model: output.Model,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Show a model's MoE anatomy: layers, experts, top-k, shared experts, sizes.

    Reads the configuration only, so it is quick for a checkpoint of any size.
    """
    import esft

    found = esft.inspect(model)
    if json:
        output.print_json(found.to_dict())
        return
    first = found.layers[0]
    layers = output.table(found.model_type, "", "")
    for name, value in (
        ("architecture", found.architecture),
        ("MoE layers", f"{len(found.layers)} (layers {_ranges([x.index for x in found.layers])})"),
        *_places(found),
        ("experts per layer", _each(layer.num_experts for layer in found.layers)),
        ("experts per token", _each(layer.top_k for layer in found.layers)),
        ("shared experts", "yes" if first.shared else "none"),
        ("router", _each(layer.scoring for layer in found.layers)),
        ("parameters", output.count(found.total)),
        (
            "  in routed experts",
            f"{output.count(found.routed)} ({output.share(found.routed / found.total)})",
        ),
        ("  in one routed expert", output.count(found.per_expert)),
        ("  in shared experts", output.count(found.shared)),
        ("  in routers", output.count(found.parts["router"])),
        ("  in everything else", output.count(found.parts["non_expert_modules"])),
    ):
        layers.add_row(name, str(value))
    output.console().print(layers)


def _places(found: Anatomy) -> list[tuple[str, str]]:
    """Say where the experts are: one line for each list of layers, with its layers' numbers."""
    places: dict[str, list[int]] = {}
    for layer in found.layers:
        parts = layer.name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        places.setdefault(".".join([*parts[:number], "*", *parts[number + 1 :]]), []).append(
            layer.index
        )
    return [(f"  layers {_ranges(indices)}", place) for place, indices in places.items()]


def _each(values: Any) -> str:
    """List the distinct values in order: layers may differ."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _ranges(numbers: list[int]) -> str:
    """Write 1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

"""`esft generate MODEL --prompt TEXT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import offload_options, output


def generate(
    model: output.Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model is to answer.")],
    delta: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A delta made from MODEL, to answer with it.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Stop after N tokens if the model does not.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0: the likeliest token each time; more: random.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the random draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    device: output.Device = None,
    dtype: output.Dtype = "auto",
    expert_memory: offload_options.Memory = None,
    expert_bits: offload_options.Bits = None,
    speculate: offload_options.Speculate = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Print a model's answer to a prompt."""
    import esft

    memory = offload_options.expert_memory(expert_memory, expert_bits, speculate)
    reporter = output.reporter()
    text = esft.generate(
        model,
        prompt,
        delta=delta,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        chat=chat,
        expert_memory=memory,
        reporter=reporter,
    )
    if memory is not None:
        reporter.note(memory.figures.summary())
    if json:
        offload = {} if memory is None else {"offload": memory.figures.to_dict()}
        output.print_json({"prompt": prompt, "text": text} | offload)
    else:
        print(text)

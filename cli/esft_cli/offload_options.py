"""Options of commands that run a model with less memory than its experts take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from esft.offload.expert_memory import ExpertMemory

Memory = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        metavar="SIZE",
        help="Memory for routed experts, such as 2GB; the others are fetched when needed.",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--expert-bits",
        metavar="N",
        help="With --expert-memory: 8, 4, 3 or 2 bits a weight of routed experts; 16: as loaded.",
    ),
]
Speculate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --expert-memory: guess the experts of the next N layers (1); 0: none.",
    ),
]


def expert_memory(
    memory: str | None, bits: int | None, speculate: int | None
) -> ExpertMemory | None:
    """Put the options together; None where the experts are all in memory."""
    if memory is None:
        for name, value in (("--expert-bits", bits), ("--speculate", speculate)):
            if value is not None:
                raise typer.BadParameter("is for --expert-memory; give that, too", param_hint=name)
        return None
    from esft.offload.expert_memory import ExpertMemory

    return ExpertMemory(
        memory,
        bits=16 if bits is None else bits,
        ahead=1 if speculate is None else speculate,
    )

"""The least time a GPU needs for a layer of experts: operations over peak, or bytes over bandwidth.

Each kernel's larger term counts, and kernels that depend on each other add up. Every tensor that a
kernel touches counts once, the rows that it gathers once a token. Padding, launches and the cast of
the trainable bank are left out: they are what a kernel loses.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = ("up_swiglu_fwd", "grouped_gemm down", "gather_sum out")
THROUGH = ("down_dact_bwd", "grouped_gemm dx", "gather_sum dx")
WEIGHTS = ("wgrad_selected down", "wgrad_selected up")
KERNELS = ("route", *FORWARD, "down_dact_bwd", *WEIGHTS, "grouped_gemm dx", "gather_sum dx")
_ITEM = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Work:
    """What a kernel must do at least: floating-point operations, and bytes to and from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: operations and bytes a second."""

    flops: float
    bytes: float

    def milliseconds(self, work: Work) -> float:
        """Return the floor of one kernel."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bytes)


@dataclass(frozen=True)
class Load:
    """A layer's sizes and how its rows fall.

    Attributes:
        hidden: H.
        inner: I.
        tokens: T.
        rows: N = T * K.
        used: experts that get rows.
        selected: trainable experts.
        selected_rows: rows that they get.
        grad_bytes: bytes of an element of a weight gradient.
    """

    hidden: int
    inner: int
    tokens: int
    rows: int
    used: int
    selected: int
    selected_rows: int
    grad_bytes: int


def works(load: Load) -> dict[str, Work]:
    """Return what each kernel of a bf16 layer must do."""
    H, I, T, N = load.hidden, load.inner, load.tokens, load.rows  # noqa: E741
    M, matrix = load.selected_rows, load.hidden * load.inner
    gathered = min(M, T) * H * _ITEM
    up, down = 2 * matrix * load.used * _ITEM, matrix * load.used * _ITEM
    summed = Work(0, (N + T) * H * _ITEM)
    return {
        # Ids in 8 bytes; where each row goes, comes from and belongs in 4 each.
        "route": Work(0, N * (8 + 3 * 4)),
        "up_swiglu_fwd": Work(4 * N * matrix, up + (T * H + 3 * N * I) * _ITEM),
        "grouped_gemm down": Work(2 * N * matrix, down + N * (I + H) * _ITEM),
        "gather_sum out": summed,
        "down_dact_bwd": Work(2 * N * matrix, down + (T * H + 4 * N * I + M * I) * _ITEM),
        "wgrad_selected down": Work(
            2 * M * matrix, gathered + M * I * _ITEM + load.selected * matrix * load.grad_bytes
        ),
        "wgrad_selected up": Work(
            4 * M * matrix,
            gathered + 2 * M * I * _ITEM + 2 * load.selected * matrix * load.grad_bytes,
        ),
        "grouped_gemm dx": Work(4 * N * matrix, up + N * (2 * I + H) * _ITEM),
        "gather_sum dx": summed,
    }


def phases(load: Load, ceilings: Ceilings) -> dict[str, float]:
    """Return the floors of a layer's forward, backward and whole step, in ms."""
    found = works(load)

    def total(names: tuple[str, ...]) -> float:
        return sum(ceilings.milliseconds(found[name]) for name in names)

    forward, backward = total(FORWARD), total(THROUGH + (WEIGHTS if load.selected else ()))
    return {"forward": forward, "backward": backward, "step": forward + backward}

"""How much memory the routed experts may take, in how many bits, and what came of it."""

from __future__ import annotations

from esft.errors import EsftError
from esft.offload.figures import OffloadFigures
from esft.plans.memory_size import memory_bytes

BITS = (16, 8, 4, 3, 2)


class ExpertMemory:
    """A budget for the routed experts of a model that is opened; one object a model.

    Attributes:
        budget: bytes that experts may take on the device.
        bits: of a stored number: 16 leaves the experts as they are loaded; 8, 4, 3 and 2 quantise
            them, see `esft.offload.quantised_store`.
        ahead: for how many layers to come experts are guessed and fetched; 0 guesses nothing.
        keep: whether a layer keeps the experts that it used last. Without, each is fetched anew:
            of use to measure what keeping them brings.
        figures: what was counted while the model ran.
    """

    def __init__(
        self, budget: str | int, *, bits: int = 16, ahead: int = 1, keep: bool = True
    ) -> None:
        """Check the numbers.

        Args:
            budget: bytes, or a text such as `2GB`.
            bits: see the class.
            ahead: see the class.
            keep: see the class.

        Raises:
            EsftError: one is out of its range.
        """
        self.budget = memory_bytes(budget, "--expert-memory")
        if bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise EsftError(f"--expert-bits {bits}: choose one of {known}")
        if ahead < 0:
            raise EsftError(f"--speculate {ahead}: expected 0 or more layers")
        self.bits = bits
        self.ahead = ahead
        self.keep = keep
        self.figures = OffloadFigures()

    @classmethod
    def of(cls, value: str | int | ExpertMemory) -> ExpertMemory:
        """Return an object as it is, and a budget with everything else as usual."""
        return value if isinstance(value, ExpertMemory) else cls(value)

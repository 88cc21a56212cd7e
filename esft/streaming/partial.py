"""A profile that is under way, on disk: after each layer, what it takes to go on from there.

    OUT.partial/
      state.json                    how far it is, of what, and what the rest holds
      states-0004.bin               what layer calls have returned for each batch, see `StateFile`
      counted-0004.safetensors      what was counted in the layer called fourth; one file a layer

`state.json` is replaced when all that it names is on disk, and only then goes what the one before
it named. So whenever the process is killed, the last layer that it names is complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from esft import processes
from esft.errors import EsftError
from esft.files import explain_write_errors, read_json, remove_folder, write_bytes, write_json
from esft.run.lock import hold
from esft.streaming.state_file import StateFile

STATE = "state.json"
FORMAT = 1


def partial_folder(out: Path) -> Path:
    """Return where a process keeps what it has done of a profile that goes to `out`."""
    process = f"-{processes.rank()}-of-{processes.count()}" if processes.count() > 1 else ""
    return out.with_name(f"{out.name}.partial{process}")


@dataclass(frozen=True)
class Reached:
    """How far an interrupted profile came.

    Attributes:
        finished: calls of decoder layers that every batch is past.
        batches: for each batch `output`, see `esft.streaming.trees`, and `waiting`, the digests of
            what it held.
        states: the file with the tensors of these.
        counted: what was counted so far, see `esft.tally.Tally.tensors`.
    """

    finished: int
    batches: list[dict[str, Any]]
    states: Path
    counted: dict[str, Tensor]


class Partial:
    """The folder, while one process holds it; made by `opened`.

    Attributes:
        folder: where it is.
        finished: calls of decoder layers that are on disk.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self._about = folder, dict(about)
        self.finished = 0
        self._counted: list[str] = []
        self._writer = ThreadPoolExecutor(1, "esft-writer")
        self._last: Future[None] | None = None

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, about: Mapping[str, Any]) -> Iterator[Partial]:
        """Hold the folder while the block runs; what is being written is complete at its end.

        Args:
            folder: made if it is missing.
            about: says what is profiled: text, numbers and lists; only a profile of the same goes
                on.

        Raises:
            OutputError: another process writes it, or it cannot be written.
        """
        with hold(folder):
            partial = cls(folder, about)
            try:
                yield partial
            finally:
                partial._writer.shutdown()

    def reached(self) -> Reached | str | None:
        """Return how far an earlier process came; why it is of no use; or None if none did."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        try:
            state = read_json(path)
            different = [key for key in self._about if state["about"].get(key) != self._about[key]]
            if state["format"] != FORMAT or different:
                return f"it is of another profile ({', '.join(different) or 'format'} differ)"
            states = self.folder / state["states"]
            if states.stat().st_size < state["bytes"]:
                return f"{states.name} is shorter than it was"
            counted: dict[str, Tensor] = {}
            for name in state["counted"]:
                counted |= load_file(self.folder / name)
            self._counted, self.finished = state["counted"], state["finished"]
            return Reached(state["finished"], state["batches"], states, counted)
        except (EsftError, SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            return f"{STATE} is damaged: {error}"

    def clear(self) -> None:
        """Forget what an earlier process has left."""
        self._counted, self.finished = [], 0
        with explain_write_errors(self.folder):
            for pattern in (STATE, "states-*.bin", "counted-*.safetensors"):
                for path in self.folder.glob(pattern):
                    path.unlink()

    def commit(
        self,
        finished: int,
        batches: list[dict[str, Any]],
        states: StateFile,
        counted: Mapping[str, Tensor],
    ) -> None:
        """Note that every batch is past so many calls of layers, while the next one computes.

        Args:
            finished: calls of layers.
            batches: as in `Reached`.
            states: with their tensors; closed when it is on disk.
            counted: in the last of these calls, for the first time or anew.

        Raises:
            OutputError: the commit before could not be written.
        """
        self.wait()
        name = f"counted-{finished:04}.safetensors"
        content = save({key: tensor.cpu().contiguous() for key, tensor in counted.items()})
        self._counted = [*self._counted, name]
        state = {
            "format": FORMAT,
            "about": self._about,
            "finished": finished,
            "states": states.path.name,
            "bytes": states.written,
            "counted": self._counted,
            "batches": batches,
        }

        def write() -> None:
            with states:
                states.sync()
                write_bytes(self.folder / name, content)
                write_json(self.folder / STATE, state)
            self.finished = finished
            for path in self.folder.glob("states-*.bin"):
                if path < states.path:  # a later one may be being written
                    with contextlib.suppress(OSError):
                        path.unlink()

        self._last = self._writer.submit(write)

    def wait(self) -> None:
        """Wait until the last commit is on disk.

        Raises:
            OutputError: it could not be written.
        """
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the folder of a profile whose scores are written."""
        if folder.is_dir():
            remove_folder(folder)

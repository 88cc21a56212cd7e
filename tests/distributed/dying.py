"""`esft`, in which one of several processes dies, or stops answering, in the middle of a step.

Run as a program: `python -m tests.distributed.dying killed|silent STEP ARGUMENTS...`. It is the
last process that does; in the step of this number it takes part in nothing more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from esft_cli import main

from esft.run.trainer import EsftTrainer

SILENT = 600.0  # seconds


def _die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SILENT)


def _main(how: str, step: int) -> None:
    training_step = EsftTrainer.training_step

    def dying(self: EsftTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            _die(how)
        return training_step(self, *args, **options)

    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        EsftTrainer.training_step = dying  # type: ignore[method-assign]
    main.run()


if __name__ == "__main__":
    _, _how, _step, *sys.argv[1:] = sys.argv
    _main(_how, int(_step))

"""How many processes a run was launched as."""

from __future__ import annotations

import os

from esft.errors import EsftError

# As torchrun and MPI launchers say it, and as accelerate would look for it.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_several() -> None:
    """Raise EsftError if a launcher has started this program as one process of several.

    Each would train the whole run on its own rows; a run is one process so far.
    """
    for name in _SIZES:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise EsftError(
                f"{name}={count}: launched as {count} processes, but a run is one process so far; "
                f"start esft train by itself, without torchrun, accelerate launch or mpirun"
            )

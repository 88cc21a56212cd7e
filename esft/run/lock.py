"""One writer a run folder: a lock that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from esft.errors import OutputError
from esft.files import explain_write_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """Be the only writer of a run folder for the length of the block.

    The operating system's lock on `RUN/.lock` decides. It ends with its process, however that
    ends, so the file that a killed run left, on this machine or another, is in nobody's way; its
    text is for the message. Where a file system has no locks the text decides: a process of this
    machine that is dead holds nothing, one of another machine does until the file is deleted.
    Folders made for the lock that are empty in the end go again.

    Raises:
        OutputError: another process writes the folder; names its id and machine. Or `run` is a
            file, or cannot be written.
    """
    with explain_write_errors(run):
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        handle = _acquire(run)
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        # While it is still locked; afterwards it may be another's.
        with contextlib.suppress(OSError):
            (run / LOCK).unlink()
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _let_go() -> None:
    """Drop the lock in a forked child: a data loader's process may outlive a run for seconds."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def _acquire(run: Path) -> int:
    while True:
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _held_by_another(handle)
            if held is not None:
                raise OutputError(f"{run}: {held}; wait for it, or choose another --out")
            # A holder deletes the file when it is done: then this one has no name any more, and
            # the next comer would lock another.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(run / LOCK)):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _signature().encode(), 0)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _held_by_another(handle: int) -> str | None:
    """Lock the file; where that is not to be had, say by whom it is held."""
    locks = fcntl is not None
    if locks:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locks = False
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        pid, host, since = int(holder["pid"]), str(holder["host"]), str(holder["since"])
    except (ValueError, KeyError, TypeError):  # just being written, or not ours
        return "another process is writing this run" if locks else None
    text = f"process {pid} on {host} has been writing this run since {since}"
    if locks:
        return text
    if host == socket.gethostname():
        return text if _is_alive(pid) else None
    return f"{text}, or died; if it did, delete {LOCK} in there"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _signature() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"

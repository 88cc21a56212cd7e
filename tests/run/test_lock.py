"""One writer a folder; what a dead one left is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from esft.errors import OutputError
from esft.run import lock as run_lock
from esft.run.lock import LOCK, hold


def test_one_holds_it(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with hold(run):
        signed = json.loads((run / LOCK).read_text())
        assert signed["pid"] == os.getpid()
        expected = f"process {os.getpid()} on .* since "
        with pytest.raises(OutputError, match=expected) as caught, hold(run):
            pass
        assert caught.value.exit_code == 1
    # Folders that were made for it alone are gone again.
    assert list(tmp_path.iterdir()) == []
    with hold(run):
        (run / "work").write_text("done")
    assert [p.name for p in run.iterdir()] == ["work"]


def test_a_holder_that_is_done_while_another_waits(tmp_path: Path) -> None:
    """The other has opened the file that the first one deletes: it must not lock a nameless one."""
    real = fcntl.flock
    first = hold(tmp_path)
    first.__enter__()

    def when_done(handle: int, how: int) -> None:
        if first_done:
            first_done.pop()()
        real(handle, how)

    first_done = [lambda: first.__exit__(None, None, None)]
    with mock.patch.object(fcntl, "flock", when_done), hold(tmp_path):
        assert (tmp_path / LOCK).is_file()
        with pytest.raises(OutputError), hold(tmp_path):
            pass


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    """A data loader's process may outlive a killed run for seconds."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from esft.run.lock import hold\n"
        "with hold(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print('ready', flush=True); time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    try:
        with hold(tmp_path):
            pass
    finally:
        os.killpg(parent.pid, 9)


def no_locks(handle: int, how: int) -> None:
    raise OSError(errno.ENOLCK, "no locks here")


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({"pid": os.getpid(), "host": socket.gethostname(), "since": "then"}, "since then; wait"),
        ({"pid": 2**22 + 1, "host": socket.gethostname(), "since": "then"}, None),
        ({"pid": 1, "host": "elsewhere", "since": "then"}, "or died; if it did, delete .lock"),
        ({}, None),
    ],
)
def test_a_file_system_without_locks(
    tmp_path: Path, holder: dict[str, object], refused: str | None
) -> None:
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with mock.patch.object(fcntl, "flock", no_locks):
        if refused is None:
            with hold(tmp_path):
                assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
            return
        with pytest.raises(OutputError, match=refused), hold(tmp_path):
            pass
    assert (tmp_path / LOCK).is_file()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="run"), hold(tmp_path / "run"):
        pass
    assert run_lock._held == set()

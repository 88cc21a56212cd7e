"""Programs that hang, fork, allocate, write, print and connect, each a real process."""

import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esft.data.row import Row
from esft.errors import EsftError
from esft.measures.metric import Answer, score_answers
from esft.measures.sandbox import run_tests

LONG = 60.0  # seconds; of programs that end by themselves, whatever else the machine does
SHORT = 3.0

linux = pytest.mark.skipif(os.uname().sysname != "Linux", reason="namespaces are Linux's")


def passes(answer: str, tests: str = "", seconds: float = LONG) -> bool:
    return run_tests(answer, tests, seconds=seconds).passed


def running(mark: str) -> list[int]:
    """Return the processes that have `mark` in their command."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_tests_decide() -> None:
    answer = "def double(n):\n    return 2 * n"
    assert passes(answer, "assert double(4) == 8")
    found = run_tests(answer, "assert double(4) == 9", seconds=LONG)
    assert found == (False, "did not pass")


@pytest.mark.parametrize(
    "answer",
    [
        "import os; os._exit(0)",  # before the tests
        "raise SystemExit",
        "def f(:",
        "'''",  # would make a string of the tests, were they one program
        "f = None\nimport sys; sys.exit(0)",
    ],
)
def test_a_program_that_never_gets_to_its_tests(answer: str) -> None:
    assert not passes(answer, "x = ''''''")


@pytest.mark.slow
def test_one_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    mark = f"sleeper-{os.getpid()}"
    # A child, and one that has left the group and the session, and its parent.
    started = (
        "import os, subprocess, sys, time\n"
        f"sleep = [sys.executable, '-c', 'import time; time.sleep(99)', '{mark}']\n"
        "subprocess.Popen(sleep)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execv(sys.executable, sleep)\n"
        "    os._exit(0)\n"
    )
    began = time.monotonic()
    found = run_tests(started + "while True: pass", "", seconds=SHORT)
    assert found == (False, f"not done after {SHORT:g} s")
    assert time.monotonic() - began < SHORT + 30
    assert running(mark) == []
    # Also when it ends by itself, and has passed.
    assert passes(started)
    assert running(mark) == []


@pytest.mark.slow
def test_a_program_that_forks_without_end() -> None:
    before = len(list(Path("/proc").glob("[0-9]*")))
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    if os.geteuid() == 0:  # root's processes are not counted: fewer, of its own account
        bomb = "import os, time\nfor _ in range(6):\n    os.fork()\ntime.sleep(99)"
    assert not passes(bomb, seconds=SHORT)
    after = len(list(Path("/proc").glob("[0-9]*")))
    assert after < before + 32


def test_memory_is_limited() -> None:
    assert not passes("x = bytearray(3 << 30)")
    assert passes("x = bytearray(100 << 20)")


def test_a_flood_of_output_goes_nowhere() -> None:
    assert passes(
        "import sys\nfor _ in range(4000):\n    print('x' * 9999)\nsys.stderr.write('y' * 10**7)"
    )


@linux
def test_files_are_written_in_its_own_folder_alone(tmp_path: Path) -> None:
    target = tmp_path / "outside"
    tmp_path.chmod(0o777)
    assert passes("open('inside', 'w').write('x')", "assert open('inside').read() == 'x'")
    assert not passes(f"open({str(target)!r}, 'w').write('x')")
    assert not target.exists()
    (tmp_path / "there").write_text("kept")
    assert not passes(f"import os; os.remove({str(tmp_path / 'there')!r})")
    # Nor is what lies elsewhere read: it may be a token.
    assert not passes(f"open({str(tmp_path / 'there')!r}).read()")
    assert (tmp_path / "there").read_text() == "kept"


def test_a_file_cannot_fill_the_disk() -> None:
    assert not passes("open('big', 'wb').write(bytes(1 << 25))")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = "import os; names = set(os.environ)"
    assert passes(seen, "assert not names & {'HF_TOKEN', 'PATH', 'PYTHONPATH'}, names")
    # Nor is it read from the process that started it.
    assert not passes(f"open('/proc/{os.getpid()}/environ').read()")


@linux
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = threading.Thread(target=lambda: server.accept(), daemon=True)
        taken.start()
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert not passes(connect)
        socket.create_connection(("127.0.0.1", port)).close()  # it was there
        taken.join(10)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="the kernel lets nobody here have a network namespace",
)
def test_there_are_no_interfaces_either() -> None:
    """Landlock knows connections of TCP only."""
    assert passes("import socket", "assert [n for _, n in socket.if_nameindex()] in ([], ['lo'])")


@linux
def test_other_processes_are_out_of_reach() -> None:
    assert not passes(f"import os; os.kill({os.getpid()}, 0)")
    assert not passes("import os; os.kill(os.getppid(), 9)", "import time; time.sleep(1); 1 / 0")


def test_installed_packages_can_be_used() -> None:
    assert passes("import numpy as np", "assert np.arange(4).sum() == 6")


def test_the_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_cannot_run_python_is_no_bad_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from esft.measures import sandbox

    sandbox._check_works.cache_clear()
    monkeypatch.setattr(sandbox, "MEMORY", 1 << 20)
    with pytest.raises(EsftError, match="cannot run Python on this machine: did not pass"):
        run_tests("", "")
    sandbox._check_works.cache_clear()


def test_pass_at_1() -> None:
    def answer(text: str, **row: Any) -> Answer:
        return Answer(Row("f:1", **row), text, "")

    tests = "assert add(1, 2) == 3"
    found = score_answers(
        "pass_at_1",
        [
            answer("def add(a, b):\n    return a + b", tests=tests),
            answer("So:\n```python\ndef add(a, b):\n    return a - b\n```", tests=tests),
            answer("    return a + b", setup="def add(a, b):\n", tests=tests),
        ],
        seconds=LONG,
    )
    assert found.rows == [1.0, 0.0, 1.0]
    assert found.value == pytest.approx(2 / 3)

"""Runs one program confined; started as a script of its own by `esft.measures.sandbox`.

It imports nothing of esft: what it confines starts as small as Python is. It stays outside of what
it confines, ends it in time with everything it started, and says what came of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# linux/sched.h, linux/prctl.h, linux/landlock.h; the system calls have these numbers everywhere.
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_FILE_SIZE, _FILES, _PROCESSES = 16 << 20, 64, 64

# What the confined Python runs. Two parts, so that an answer cannot swallow the tests; the token
# tells that the tests came to their end, which an exit status of 0 would not.
_RUNNER = """
import json, os, sys
folder, out = os.getcwd(), int(sys.argv[1])
with open("program.json", encoding="utf-8") as file:
    program = json.load(file)
os.remove("program.json")
names = {"__name__": "__main__"}
for part in ("answer", "tests"):
    exec(compile(program[part], part + ".py", "exec"), names)
os.write(out, program["token"].encode())
"""


def main() -> None:
    """Run what `sys.argv[1]` describes; print `{"passed": ..., "why": ...}`."""
    job = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform == "linux"
    own_users = linux and _part(libc)
    if linux:
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    token = json.loads(Path("program.json").read_text(encoding="utf-8"))["token"]
    told, tell = os.pipe()

    def confine() -> None:
        if linux:
            libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _limit(job, own_users=own_users)
        if linux:
            _restrict_files(libc, job["readable"])

    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _RUNNER, str(tell)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[tell],
        start_new_session=True,
        preexec_fn=confine,  # there is one thread here
    )
    os.close(tell)
    why = ""
    try:
        process.wait(job["seconds"])
    except subprocess.TimeoutExpired:
        why = f"not done after {job['seconds']:g} s"
    _end(process)
    os.set_blocking(told, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(told, 2 * len(token))
    passed = not why and said == token.encode()
    print(json.dumps({"passed": passed, "why": why or ("" if passed else "did not pass")}))


def _part(libc: Any) -> bool:
    """Leave the network and other processes, as far as the kernel lets; say if users, too."""
    if libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC) == 0:
        return True
    for flag in (_NEW_NET, _NEW_PID, _NEW_IPC):
        libc.unshare(flag)
    return False


def _limit(job: dict[str, Any], *, own_users: bool) -> None:
    import resource

    seconds = int(job["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: _FILE_SIZE,
        resource.RLIMIT_NOFILE: _FILES,
        resource.RLIMIT_CORE: 0,
    }
    if own_users:  # elsewhere the user's other processes would count
        limits[resource.RLIMIT_NPROC] = _PROCESSES
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
            resource.setrlimit(which, (value, value))


def _restrict_files(libc: Any, readable: list[str]) -> None:
    """Let files be read below `readable` and written in the working directory: Landlock."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1
    if version >= 5:
        rights |= 1 << 15
    connect = 3 if version >= 4 else 0
    scoped = 3 if version >= 6 else 0
    attributes = struct.pack("=QQQ", rights, connect, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        return
    read = _EXECUTE | _READ_FILE | _READ_DIR
    allowed = [(path, read) for path in readable]
    allowed += [(os.getcwd(), rights), ("/dev/null", _READ_FILE | _WRITE_FILE)]
    allowed += [("/dev/urandom", _READ_FILE), ("/dev/zero", _READ_FILE)]
    for path, wanted in allowed:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            wanted &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", wanted & rights, opened), 0)
        os.close(opened)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all that it started, also what left its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 5
    while time.monotonic() < until and (left := _children()):
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _children() -> list[int]:
    """Return the processes that this one has to wait for; orphans have come to it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in brackets, may hold anything; the state and the parent come after it.
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


if __name__ == "__main__":
    main()

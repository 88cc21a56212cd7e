"""Writing is whole or not at all: killed writers, full disks, and what stands in the way."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from esft import files
from esft.errors import EsftError, OutputError

ROOT = Path(__file__).parents[1]


def in_process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


OLD_FOLDER, NEW_FOLDER = {"out/a": "old"}, {"out/a": "new", "out/b/c": "new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed writer is a forked process")
@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        ("file", [{"out": "old"}, {"out": "new"}]),
        ("new file", [{}, {"out": "new"}]),
        # A folder is replaced by two renames; between them it is away, never half there.
        ("folder", [OLD_FOLDER, {}, NEW_FOLDER]),
        ("new folder", [{}, NEW_FOLDER]),
    ],
)
def test_a_writer_killed_at_any_line(what: str, allowed: list[object], tmp_path: Path) -> None:
    ran = in_process(sys.executable, "tests/killed_writer.py", what, str(tmp_path / "work"))
    assert ran.returncode == 0, ran.stderr
    states = json.loads(ran.stdout)
    assert len(states) > 15  # one more than there are lines; the last writer was not killed
    assert [state for state in states if state not in allowed] == []
    # In this order, and both ends do occur.
    places = [allowed.index(state) for state in states]
    assert places == sorted(places)
    assert places[0] == 0
    assert states[-1] == allowed[-1]


WRITE = """
import sys
from pathlib import Path
from esft import files
from esft.errors import OutputError
path, kind = Path(sys.argv[1]), sys.argv[2]
try:
    if kind == "file":
        files.write_bytes(path, bytes(200_000))
    else:
        with files.new_folder(path) as folder:
            (folder / "small").write_bytes(bytes(1000))
            files.write_bytes(folder / "large", bytes(200_000))
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""
ON_A_DISK = """
mount -t tmpfs -o "$1" tmpfs "$2" || exit 77
"$3" -c "$4" "$2/$5" "$6"
status=$?
ls -A "$2"
exit $status
"""


def write_on_a_disk(options: str, name: str, kind: str, mount: Path) -> tuple[str, list[str]]:
    """Write to a disk mounted for that process only; return what was said and what is left."""
    unshare = ("unshare", "--user", "--map-root-user", "--mount")
    arguments = (options, str(mount), sys.executable, WRITE, name, kind)
    try:
        ran = in_process(*unshare, "sh", "-c", ON_A_DISK, "sh", *arguments)
    except FileNotFoundError:
        pytest.skip("no unshare command here to mount a small disk with")
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip(f"this system lets nobody mount a small disk: {ran.stderr.strip()}")
    assert ran.returncode == 1, ran.stderr
    message, *left = ran.stdout.splitlines()
    return message, left


KINDS = pytest.mark.parametrize(("name", "kind"), [("out.txt", "file"), ("out", "folder")])


@KINDS
def test_a_full_disk(name: str, kind: str, tmp_path: Path) -> None:
    message, left = write_on_a_disk("size=96k", name, kind, tmp_path)
    assert message.startswith(str(tmp_path / ("." if kind == "folder" else name)))
    assert "no space left on the disk (200,000 bytes needed); nothing kept" in message
    assert left == []


@KINDS
def test_a_read_only_disk(name: str, kind: str, tmp_path: Path) -> None:
    message, left = write_on_a_disk("ro", name, kind, tmp_path)
    assert message == f"{tmp_path / name}: cannot write: Read-only file system"
    assert left == []


def test_a_file_larger_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n{WRITE}"
    ran = in_process(sys.executable, "-c", code, str(tmp_path / "out.txt"), "file")
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout == f"{tmp_path / 'out.txt'}: cannot write: File too large\n"
    assert os.listdir(tmp_path) == ["out.txt"]
    assert (tmp_path / "out.txt").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        files.write_text(tmp_path / "out.txt", "new")
    with pytest.raises(OutputError, match="Permission denied"), files.new_folder(tmp_path / "out"):
        pass


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is synced and renamed, in order; everything still happens.

    `("sync", inode, bytes of a file)` and `("rename", inode)`.
    """
    found: list[tuple[object, ...]] = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        status = os.fstat(handle)
        fsync(handle)
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        found.append(("sync", status.st_ino, size))

    def record_replace(source: Path, target: Path) -> None:
        found.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return found


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_file_s_bytes_reach_the_disk_before_its_name(
    events: list[tuple[object, ...]], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("old")
    files.write_text(tmp_path / "out", "newer")
    file = inode(tmp_path / "out")
    assert events == [("sync", file, 5), ("rename", file), ("sync", inode(tmp_path), None)]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_s_content_reaches_the_disk_before_its_name(
    replaced: bool, events: list[tuple[object, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    retired = None
    if replaced:
        out.mkdir()
        (out / "old").write_text("old")
        retired = inode(out)
    with files.new_folder(out, replace=replaced) as folder:
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "c").write_text("1234567")
        (folder / "d").write_text("1")
    content = {
        ("sync", inode(out / "a" / "b" / "c"), 7),
        ("sync", inode(out / "d"), 1),
        *(("sync", inode(path), None) for path in (out / "a", out / "a" / "b", out)),
    }
    assert set(events[: len(content)]) == content
    renames = [("rename", retired)] if replaced else []
    assert events[len(content) :] == [
        *renames,
        ("rename", inode(out)),
        ("sync", inode(tmp_path), None),
    ]


def test_write_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "value.json"
    value = {"name": "Müller\n", "n": [1, 2.5, None]}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert "Müller" in path.read_text(encoding="utf-8")
    assert os.listdir(path.parent) == ["value.json"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "file", "x")
        with files.new_folder(tmp_path / "folder") as folder:
            files.write_text(folder / "file", "x")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")}
    assert modes == {"file": 0o640, "folder": 0o750}
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "new"
    assert visible(tmp_path) == ["disk", "link", "out", "real"]


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    with pytest.raises(OutputError, match="not a regular file"):
        files.write_text(tmp_path / "null", "new")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="not a regular file"):
        files.write_text(pipe, "new")
    assert pipe.is_fifo()


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a regular file"):
        files.write_text(tmp_path, "new")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="cannot write: File exists"):
        files.write_text(tmp_path / "file" / "out", "new")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError), files.new_folder(path):
            pass
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(OutputError, match="File name too long"):
        files.write_text(path, "new")
    with pytest.raises(OutputError, match="File name too long"), files.new_folder(path):
        pass
    files.write_text(tmp_path / ("x" * 255), "new")  # the longest that fits


def test_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with files.new_folder(tmp_path / "out") as folder:  # an empty one is not in the way
        (folder / "a").write_text("1")
    with (
        pytest.raises(OutputError, match="exists and is not empty"),
        files.new_folder(tmp_path / "out"),
    ):
        pytest.fail("the work started")
    with files.new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "b").write_text("2")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_folder_never_appears(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), files.new_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    """Two runs write into one place: the first to end wins, the other says so."""
    with (  # noqa: PT012
        pytest.raises(OutputError, match="not empty"),
        files.new_folder(tmp_path / "out") as mine,
    ):
        (mine / "mine").write_text("1")
        with files.new_folder(tmp_path / "out") as theirs:
            (theirs / "theirs").write_text("2")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1,\n "b" 2}', ":2: not JSON"),
        (b"", ":1: not JSON"),
        (b'{"a": "\xe9"}', "not UTF-8 text (byte 7)"),
        (b"[" * 200_000, "not usable JSON"),
        (b"1" * 5000, "not usable JSON"),
    ],
)
def test_json_that_cannot_be_read(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(data)
    with pytest.raises(EsftError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EsftError, match="no such selection"):
        files.read_json(tmp_path / "value.json", "selection")
    with pytest.raises(EsftError, match="Is a directory"):
        files.read_json(tmp_path)
    (tmp_path / "file").write_text("1")
    with pytest.raises(EsftError, match="Not a directory"):
        files.read_json(tmp_path / "file" / "value.json")


def test_numbers_that_json_does_not_have_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_sha256_of_a_file_larger_than_one_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "data").write_bytes(data)
    assert files.sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()

"""The one module that writes files: whole or not at all.

A file is written under a temporary name beside its place, synced to disk and renamed; a folder is
filled under a temporary name and renamed when complete. A reader never sees half of either.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from esft.errors import EsftError, OutputError

_CHUNK = 1 << 22  # bytes read at a time
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}", re.DOTALL)  # as `_beside` names them


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, reading 4 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def to_json(value: Any) -> str:
    """Serialise `value`: two spaces of indent, non-ASCII letters kept, newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, what: str = "file", error: type[EsftError] = EsftError) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it is, for messages.
        error: what is raised.

    Raises:
        EsftError: the file is missing, is not UTF-8 or is not JSON; the message says where.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such {what}") from None
    except OSError as found:
        raise error(f"{path}: cannot read this {what}: {found.strerror}") from None
    except UnicodeDecodeError as found:
        raise error(f"{path}: this {what} is not UTF-8 text (byte {found.start})") from None
    except json.JSONDecodeError as found:
        raise error(f"{path}:{found.lineno}: not JSON: {found.msg}") from None
    except (RecursionError, ValueError) as found:  # nested too deep; a number too long
        raise error(f"{path}: not usable JSON: {found}") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically. See `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically. See `write_bytes`."""
    write_text(path, to_json(value))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, making missing parent folders.

    A symbolic link stays one: the file that it names is written.

    Raises:
        OutputError: the disk is full, the folder is read-only, or the like, or `path` is a device
            or a folder; `path` is as before.
    """
    path = Path(path)
    with explain_write_errors(path, needed=len(data)):
        target = Path(os.path.realpath(path))
        # A rename would put a file in the place of /dev/null.
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: not a regular file; choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(target.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log; a reader never sees more than one incomplete line, the last.

    Raises:
        OutputError: the disk is full or read-only.
    """
    with explain_write_errors(path, needed=len(line) + 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    Everything in it is synced before the rename, so `path` either does not exist or is complete.
    A folder that is replaced is out of sight for the moment between two renames.

    Args:
        path: where the folder is to appear.
        replace: whether an existing `path` may be replaced; an empty folder always may.

    Raises:
        OutputError: `path` exists, or the disk is full or read-only.
    """
    path = Path(path)
    refuse_existing(path, replace=replace)
    with explain_write_errors(path):
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target)
        temporary.mkdir()
        try:
            yield temporary
            items = [*sorted(temporary.rglob("*")), temporary]
            # Some file systems find out only now that they are full.
            size = sum(item.stat().st_size for item in items if item.is_file())
            with explain_write_errors(path, needed=size):
                for item in items:
                    if item.is_file():
                        sync_file(item)
                    elif item.is_dir():
                        sync_folder(item)
                _swap(temporary, target, replace=replace)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OutputError):  # the user knows the folder by its own name
                raise OutputError(str(error).replace(str(temporary), str(path))) from error
            raise
        sync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; a reader never sees a part of it. What cannot be deleted stays, hidden."""
    with contextlib.suppress(OSError):
        hidden = _beside(path)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what writers into a folder left under temporary names when they were killed."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if not _TEMPORARY.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def refuse_unwritable(path: Path) -> None:
    """Raise OutputError if a file could not be written at `path`: to be told before the work."""
    with explain_write_errors(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: not a regular file; choose another --out")
        folder = target.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"{path}: cannot write into {folder}; choose another --out")


def refuse_existing(path: Path, *, replace: bool = False, but_for: Collection[str] = ()) -> None:
    """Raise OutputError if `path` is a file, or a folder with content that may not be replaced.

    Args:
        path: where something is to appear.
        replace: whether a folder's content may be replaced.
        but_for: names in the folder that do not count.
    """
    with explain_write_errors(path):
        if path.is_dir():
            if not replace and any(item.name not in but_for for item in path.iterdir()):
                raise OutputError(
                    f"{path}: the folder exists and is not empty; choose another --out"
                )
        elif path.exists() or path.is_symlink():
            raise OutputError(f"{path}: a file is in the way; choose another --out")


@contextlib.contextmanager
def explain_write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's write errors inside the block into an OutputError.

    Args:
        path: what was being written; named in the message.
        needed: bytes that the write needs, where known; named if the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError):
            # The library keeps the system's error only in its text.
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:  # not of the system's: damaged data
                raise
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = "" if needed is None else f" ({needed:,} bytes needed)"
            raise OutputError(f"{path}: no space left on the disk{size}; nothing kept") from error
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        sync_file(path)


def _beside(path: Path) -> Path:
    """Name a temporary place in the same folder, hence on the same disk."""
    # Not from `tempfile`, whose files only their owner may read, whatever the umask says.
    return path.parent / f".{path.name[:50]}.{secrets.token_hex(6)}"


def _swap(folder: Path, target: Path, *, replace: bool) -> None:
    """Rename `folder` to `target`; a folder that is there goes, or comes back if that fails."""
    if not (replace and target.is_dir()):
        # Fails if another run has put a folder there since we looked.
        os.replace(folder, target)
        return
    retired = _beside(target)
    os.replace(target, retired)
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)
